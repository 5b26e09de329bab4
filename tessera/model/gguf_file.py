"""A GGUF file: its metadata and its tensors, read in place.

The layout is the GGUF specification's (ggml, docs/gguf.md), versions 2 and 3, little endian. The file is
untrusted: every length is checked against what the file holds before it is used.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from struct import error as struct_error
from typing import TYPE_CHECKING, Any

from tessera.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

MAX_STRING_BYTES = 2**26
MAX_ARRAY_ITEMS = 2**24
MAX_DIMENSIONS = 4

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""ggml's type number -> its name, the weights in one quantised group, and the bytes of that group."""

_UINT32, _UINT64 = Struct("<I"), Struct("<Q")
_STRING, _ARRAY = 8, 9
_NUMBERS: dict[int, Struct] = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    4: _UINT32,
    5: Struct("<i"),
    6: Struct("<f"),
    7: Struct("<?"),
    10: _UINT64,
    11: Struct("<q"),
    12: Struct("<d"),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file; reading `data` touches the file, nothing before that does."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch."""
    type: int
    """ggml's type number, a key of TENSOR_TYPES and a value of gguf.GGMLQuantizationType."""
    offset: int
    """Of the first byte in the file."""
    num_bytes: int
    buffer: mmap.mmap = field(repr=False)

    @property
    def type_name(self) -> str:
        """The type as ggml writes it, Q4_1 for example."""
        return TENSOR_TYPES[self.type][0]

    @property
    def data(self) -> Tensor:
        """The raw bytes, [num_bytes] uint8, a view of the file that keeps it open; writing to it changes no file."""
        import torch  # the tokenizer reads GGUF files without torch

        return torch.frombuffer(self.buffer, dtype=torch.uint8, count=self.num_bytes, offset=self.offset)


class GGUFFile:
    """A GGUF file's metadata and tensor directory; ModelError when it is not a whole, sound GGUF file."""

    metadata: dict[str, Any]
    """Keys as in the file; an array is a list."""
    tensors: dict[str, GGUFTensor]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        buffer = _map(self.path)
        cursor = _Cursor(self.path, buffer)
        self.version = _check_version(cursor)
        num_tensors = cursor.count("tensor count", 24)
        num_entries = cursor.count("metadata count", 13)
        self.metadata = _read_metadata(cursor, num_entries)
        self.tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, self.metadata), buffer)


class _Cursor:
    """A position in the file; every read is checked against the file's end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.position = 0

    def damaged(self, what: str) -> ModelError:
        """The error that says what is wrong with the file."""
        return ModelError(f"{self.path} is damaged: {what}", "download the file again")

    def number(self, layout: Struct, what: str) -> Any:
        """The number at this position."""
        try:
            (value,) = layout.unpack_from(self.buffer, self.position)
        except struct_error:
            raise self.damaged(f"it ends at byte {self.size}, inside {what}") from None
        self.position += layout.size
        return value

    def count(self, what: str, item_bytes: int) -> int:
        """How many items of at least `item_bytes` follow; no more than the file has room for."""
        value: int = self.number(_UINT64, what)
        if value * item_bytes > self.size - self.position:
            raise self.damaged(f"{what} is {value}, more than its {self.size} bytes can hold")
        return value

    def string(self, what: str) -> str:
        """The length-prefixed UTF-8 string at this position."""
        return self.strings(1, what)[0]

    def strings(self, count: int, what: str) -> list[str]:
        """The next `count` strings; one loop, since a vocabulary has a hundred thousand of them."""
        buffer, size, position, unpack = self.buffer, self.size, self.position, _UINT64.unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                (num_bytes,) = unpack(buffer, position)
                position += 8
                if num_bytes > size - position or num_bytes > MAX_STRING_BYTES:
                    raise self.damaged(f"a string of {num_bytes} bytes at byte {position} in {what}")
                values.append(str(buffer[position : position + num_bytes], "utf-8"))
                position += num_bytes
        except struct_error:
            raise self.damaged(f"it ends at byte {size}, inside {what}") from None
        except UnicodeDecodeError:
            raise self.damaged(f"the string at byte {position} in {what} is not UTF-8") from None
        self.position = position
        return values

    def numbers(self, layout: Struct, count: int, what: str) -> list[Any]:
        """The next `count` numbers."""
        end = self.position + count * layout.size
        if end > self.size:
            raise self.damaged(f"it ends at byte {self.size}, inside {what}")
        values = [value for (value,) in layout.iter_unpack(self.buffer[self.position : end])]
        self.position = end
        return values


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # Copy on write: torch warns of buffers it may not write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise ModelError(f"{path} is empty", "download the file again") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}", "check --model") from None


def _check_version(cursor: _Cursor) -> int:
    if cursor.buffer[:4] != b"GGUF":
        raise ModelError(f"{cursor.path} is not a GGUF file: it begins with {cursor.buffer[:4]!r}", "check --model")
    cursor.position = 4
    version: int = cursor.number(_UINT32, "the version")
    if version in (2, 3):
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3):
        raise ModelError(f"{cursor.path} is a big-endian GGUF file", "convert it for little-endian machines")
    raise ModelError(f"{cursor.path} is GGUF version {version}, only 2 and 3 are read", "convert the model again")


def _read_metadata(cursor: _Cursor, num_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.damaged(f"the metadata key {key[:80]!r} appears twice")
        metadata[key] = _read_value(cursor, cursor.number(_UINT32, "a metadata type"), f"{key[:80]!r}")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], what)
    raise cursor.damaged(f"{what} has the unknown metadata type {kind}")


def _read_array(cursor: _Cursor, what: str) -> list[Any]:
    kind: int = cursor.number(_UINT32, what)
    if kind != _STRING and kind not in _NUMBERS:
        raise cursor.damaged(f"{what} is an array of the metadata type {kind}, which is not read")
    count = cursor.count(f"the length of {what}", 8 if kind == _STRING else _NUMBERS[kind].size)
    if count > MAX_ARRAY_ITEMS:
        raise cursor.damaged(f"{what} has {count} items, at most {MAX_ARRAY_ITEMS} are read")
    return cursor.strings(count, what) if kind == _STRING else cursor.numbers(_NUMBERS[kind], count, what)


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 1 <= value <= 2**20 or value & (value - 1):
        raise cursor.damaged(f"general.alignment is {value!r:.40}, which is no power of two")
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int, buffer: mmap.mmap) -> dict[str, GGUFTensor]:
    entries = [_read_tensor_entry(cursor) for _ in range(count)]
    start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise cursor.damaged(f"the tensor {name!r:.80} appears twice")
        num_bytes = _num_bytes(cursor, name, shape, kind)
        if offset % alignment or start + offset + num_bytes > cursor.size:
            place = f"{num_bytes} bytes at byte {start + offset} of {cursor.size}"
            raise cursor.damaged(f"the tensor {name!r:.80} would lie outside the file or askew: {place}")
        tensors[name] = GGUFTensor(name, shape, kind, start + offset, num_bytes, buffer)
    return tensors


def _read_tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string("a tensor name")
    num_dimensions: int = cursor.number(_UINT32, f"the tensor {name!r:.80}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {name!r:.80} has {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
    what = f"the tensor {name!r:.80}"
    shape = tuple(cursor.number(_UINT64, what) for _ in range(num_dimensions))
    return name, shape[::-1], cursor.number(_UINT32, what), cursor.number(_UINT64, what)


def _num_bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in TENSOR_TYPES:
        raise ModelError(
            f"{cursor.path}: the tensor {name!r:.80} has the unknown type {kind}", "convert the model again"
        )
    _, group_weights, group_bytes = TENSOR_TYPES[kind]
    if 0 in shape or shape[-1] % group_weights:
        raise cursor.damaged(
            f"the tensor {name!r:.80} has the shape {list(shape)}, rows are of {group_weights} weights"
        )
    num_weights = 1
    for length in shape:
        num_weights *= length
    return num_weights // group_weights * group_bytes
