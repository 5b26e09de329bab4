"""What tuning found is kept on disk under all it depends on, and serves where it was found and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from attention_cases import make_shape
from tessera.attention import cache, kept, prove, tune_store
from tessera.attention.backends.triton_choice import choose, shipped
from tessera.attention.backends.triton_options import LEAST_SHARED_MEMORY, Options
from tessera.attention.backends.triton_tables import KNOWN
from tessera.attention.contract import Phase
from tessera.attention.step import Bucket
from tessera.attention.tune_store import Found, Part, Trial

SHAPE = make_shape(dtype=torch.float16)
TABLE = shipped(Phase.PREFILL, SHAPE, LEAST_SHARED_MEMORY).few


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what is tuned in this test is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tessera" / "tuned"


OTHER = Options(32, 32, 2, 2)


def keep_other(phase: Phase = Phase.PREFILL, part: Part = Part.ALL, options: Options = OTHER) -> None:
    trials = [Trial(TABLE, [1.0]), Trial(options, [0.5])]
    tune_store.write([(phase, part, SHAPE, Found(options, ["1 x 20"], trials))])


@pytest.mark.usefixtures("folder")
def test_what_was_tuned_is_chosen_before_what_is_shipped() -> None:
    before = choose(Phase.PREFILL, SHAPE)
    keep_other()
    after = choose(Phase.PREFILL, replace(SHAPE, scale=3.0))  # no time depends on it
    assert (before.few, before.source) == (TABLE, "options shipped for any GPU")
    assert (after.few, after.source) == (OTHER, "options tuned on this device")
    assert choose(Phase.VISION, SHAPE) == shipped(Phase.VISION, SHAPE, LEAST_SHARED_MEMORY)


@pytest.mark.usefixtures("folder")
def test_few_and_many_sequences_are_tuned_apart() -> None:
    table = choose(Phase.DECODE, SHAPE)
    many = Options(0, 16, 2, 2, programs_per_sm=3, min_split=64, balanced_per_sm=5)
    keep_other(Phase.DECODE, Part.MANY, many)
    choice = choose(Phase.DECODE, SHAPE)
    assert (choice.few, choice.many) == (table.few, many)
    assert choice.source == "options tuned on this device with many sequences, else options shipped for any GPU"
    assert choice.in_decode(SHAPE, 4, 1) == table.few and choice.in_decode(SHAPE, 4, 99).block_n == 16
    assert choice.most_parts >= 10


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: '{"key": {}, "found": {}}',
        lambda text: text.replace('"block_n": 32', '"block_n": 7'),
        lambda text: text.replace('"block_n": 32', '"block_n": "many"'),
        lambda text: json.dumps(json.loads(text) | {"key": json.loads(text)["key"] | {"device": "another"}}),
    ],
    ids=["empty", "cut off", "of no key", "cannot be compiled", "no number", "of another device"],
)
def test_a_damaged_or_foreign_file_means_the_shipped_options(folder: Path, damage: Callable[[str], str]) -> None:
    keep_other()
    (path,) = folder.iterdir()
    path.write_text(damage(path.read_text()))
    assert choose(Phase.PREFILL, SHAPE) == shipped(Phase.PREFILL, SHAPE, LEAST_SHARED_MEMORY)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_other()
    assert choose(Phase.PREFILL, SHAPE).few == TABLE


def test_the_key_changes_with_everything_it_depends_on() -> None:
    def key(phase: Phase = Phase.DECODE, part: Part = Part.FEW, **changed: Any) -> str:
        return str(tune_store.make_key(phase, part, replace(SHAPE, **changed)))

    changes: list[dict[str, Any]] = [
        {"head_dim": 64},
        {"dtype": torch.bfloat16},
        {"page_size": 32},
        {"window": 9},
        {"num_q_heads": 12},
        {"capability": (8, 6)},
        {"shared_memory": 5},
    ]
    keys = [key(), key(Phase.VISION), key(part=Part.MANY), *(key(**changed) for changed in changes)]
    for module, name, value in (
        (prove, "version", lambda package: f"{package} 999"),
        (tune_store, "machine", lambda _: {"device": "another"}),
        (tune_store, "code_digest", lambda _: "another"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(key())
    assert len(set(keys)) == len(keys) and key() == keys[0]


def test_the_driver_is_part_of_a_gpus_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    keys = []
    for line in ("driver 1", "driver 2"):
        monkeypatch.setattr(kept, "driver", lambda line=line: line)
        keys.append(kept.machine("cuda"))
    assert keys[0] != keys[1] and keys[0]["device"] == "GPU"


@pytest.mark.usefixtures("folder")
def test_a_measured_choice_is_made_anew_after_tuning() -> None:
    def key() -> dict[str, str]:
        return cache.make_key(Phase.PREFILL, {SHAPE: 2}, [Bucket(1, 20, 20)])

    before = key()
    keep_other()
    assert key() != before


def test_a_shipped_table_names_files_that_say_how_it_was_measured() -> None:
    results = Path(__file__).parents[2] / "docs" / "results"
    for gpu in KNOWN:
        assert gpu.measured and all((results / name).exists() for name in gpu.measured)
