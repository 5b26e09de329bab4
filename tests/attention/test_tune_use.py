"""What was tuned is what kernels are launched with, at start and by command; on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from attention_cases import make_shape
from plug_ins import config
from tessera import cli
from tessera.attention import tune, tune_space, tune_store
from tessera.attention.backends.triton import Triton
from tessera.attention.backends.triton_choice import many_from
from tessera.attention.backends.triton_decode import DecodePlan
from tessera.attention.backends.triton_ladder import TritonFa2
from tessera.attention.backends.triton_options import Options, device_resources
from tessera.attention.choose import build_attention
from tessera.attention.contract import Phase
from tessera.attention.tune import Wanted, search
from tessera.attention.tune_store import Found, Part, Trial
from tessera.attention.workloads import Case, Workload, make_case
from tessera.model import known_shapes
from triton_interpreter import (
    DEVICE,
    INTERPRETED,
    check_in_interpreter,
    needs_kernels,
    outside_interpreter,
)

SHAPE = make_shape(device=DEVICE, dtype=torch.float16)
TILES = Options(32, 16, 2, 2)
SPLITS = Options(0, 16, 2, 2, programs_per_sm=3, min_split=32, balanced_per_sm=3)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tuned when a test begins."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Phase, Part]]:
    """A GPU that no table knows; what is searched on it, which takes no time."""
    found: list[tuple[Phase, Part]] = []

    def at_once(wanted: Wanted, *, seconds: float) -> Found:
        assert seconds > 0
        found.append((wanted.phase, wanted.part))
        return result(SPLITS if wanted.phase is Phase.DECODE else TILES)

    monkeypatch.setattr(tune, "is_unknown", lambda _: True)
    monkeypatch.setattr(tune, "search", at_once)
    monkeypatch.setattr("tessera.attention.tune.uses_hopper_kernel", lambda *_: False)
    return found


def result(options: Options) -> Found:
    return Found(options, ["1 x 20"], [Trial(options, [1.0])])


def build(**settings: object) -> dict[str, str]:
    """Phase -> why its backend serves."""
    _, _, choices = build_attention(
        config(**({"attention": "triton", "attention_measure": "cached"} | settings)), [SHAPE], 16
    )
    return {choice.phase: choice.reason for choice in choices}


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


def may_be_long(case: Case) -> Case:
    """Planned for sequences so long that options decide how they are cut up, as a graph's may be."""
    return replace(case, batch=replace(case.batch, max_kv_len=4096))


@needs_kernels
@pytest.mark.parametrize(
    ("phase", "part", "options", "module", "function"),
    [
        (Phase.PREFILL, Part.ALL, TILES, "paged_prefill", "paged_prefill"),
        (Phase.VISION, Part.ALL, TILES, "packed", "packed_attention"),
        (Phase.DECODE, Part.FEW, SPLITS, "paged_decode", "paged_decode"),
        (Phase.DECODE, Part.MANY, SPLITS, "paged_decode", "paged_decode"),
    ],
)
def test_the_kernel_is_launched_with_what_was_tuned(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, part: Part, options: Options, module: str, function: str
) -> None:
    kernel = import_module(f"tessera.kernels.{module}")
    launched: list[dict[str, int]] = []
    launch = getattr(kernel, function)

    def watched(*given: Any) -> Any:
        launched.append(given[-1])
        return launch(*given)

    monkeypatch.setattr(kernel, function, watched)
    many = many_from(SHAPE, device_resources(SHAPE)[0])
    lens = ((1, 70), (1, 3)) if part is not Part.MANY else ((1, 5),) * many
    lens = lens if phase is Phase.DECODE else ((37, 37), (5, 5))
    case = make_case(phase, Workload(lens), SHAPE)
    if phase is Phase.DECODE:
        case = may_be_long(case)
    assert case.problems(case.answer(Triton)) == []
    tune_store.write([(phase, part, case.shape, result(options))])
    assert case.problems(case.answer(Triton)) == []
    before, after = launched
    assert after == options.arguments() != before


@needs_kernels
def test_splits_follow_what_was_tuned_for_as_many_sequences() -> None:
    case = may_be_long(make_case(Phase.DECODE, Workload(((1, 200),)), SHAPE))
    tune_store.write([(Phase.DECODE, Part.MANY, case.shape, result(SPLITS))])
    untouched = Triton(Phase.DECODE, case.shape).plan(case.batch)
    tune_store.write([(Phase.DECODE, Part.FEW, case.shape, result(SPLITS))])
    plan = Triton(Phase.DECODE, case.shape).plan(case.batch)
    assert isinstance(untouched, DecodePlan) and isinstance(plan, DecodePlan)
    assert untouched.options != SPLITS == plan.options
    assert plan.shares.min_split >= 16 and plan.shares.num_splits > 1


@needs_kernels
def test_a_rung_of_the_ladder_keeps_what_is_shipped() -> None:
    tune_store.write([(Phase.PREFILL, Part.ALL, SHAPE, result(TILES))])
    assert Triton(Phase.PREFILL, SHAPE).options_from == "options tuned on this device"
    assert TritonFa2(Phase.PREFILL, SHAPE).options_from.startswith("options shipped for ")


@needs_kernels
def test_a_search_with_real_kernels_and_real_times_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_space, "MOST_CANDIDATES", 2)
    wanted = Wanted(Phase.PREFILL, Part.ALL, SHAPE)
    found = search(wanted)
    assert len(found.trials) >= 3 and found.untried == 0 and found.seconds > 0
    assert [trial.problem for trial in found.trials] == [""] * len(found.trials)
    assert all(ms > 0 for trial in found.trials for ms in trial.times_ms)
    tune.keep([(wanted, found)])
    assert tune.kept(wanted) == found


@needs_kernels
def test_an_unknown_gpu_is_tuned_once_at_start_and_the_reason_says_so(searched: list[tuple[Phase, Part]]) -> None:
    every = [(Phase.PREFILL, Part.ALL), (Phase.DECODE, Part.FEW), (Phase.DECODE, Part.MANY)]
    for _ in range(2):
        assert build() == {
            "prefill": "named; triton: options tuned on this device",
            "decode": "named; triton: options tuned on this device, few short sequences a block a program",
        }
        assert searched == every
    build(attention_measure="force")
    assert searched == 2 * every


@needs_kernels
def test_nothing_is_searched_where_nobody_would_use_it(
    monkeypatch: pytest.MonkeyPatch, searched: list[tuple[Phase, Part]]
) -> None:
    shipped = build(attention_measure="off")
    assert all(reason.startswith("named; triton: options shipped for ") for reason in shipped.values())
    build(attention="naive")
    assert searched == []
    build(attention="naive", prefill_attention="triton")
    assert searched == [(Phase.PREFILL, Part.ALL)]
    monkeypatch.setattr(tune, "is_unknown", lambda _: False)
    build(attention_measure="force")
    assert searched == [(Phase.PREFILL, Part.ALL)]


@needs_kernels
@pytest.mark.usefixtures("searched")
def test_a_search_that_fails_is_no_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Found:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(tune, "search", fail)
    assert all("options shipped for " in reason for reason in build().values())


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A tiny model's folder."""
    shape = known_shapes._llama(64, 128, 2, 2, 1, 100, max_position_embeddings=256, eos_token_id=3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape | {"torch_dtype": "float32"}))
    return str(tmp_path / "model")


@needs_kernels
def test_the_command_searches_once_unless_it_is_forced_and_shows_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.setattr(tune_space, "MOST_CANDIDATES", 1)

    def run(*more: str) -> list[dict[str, Any]]:
        assert cli.main(["tune", model, "--phase", "prefill", "--dtype", "float32", "--json", *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (first,) = run()
    assert (first["phase"], first["part"], first["dtype"]) == ("prefill", "all batches", "float32")
    assert not first["kept"] and len(first["trials"]) >= 2 and first["trials"][0]["times_ms"][0] > 0
    assert run() == [first | {"kept": True}]
    assert not run("--force")[0]["kept"]
    assert not run("--page-size", "32")[0]["kept"]
    assert cli.main(["tune", "--model", model, "--phase", "prefill", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "2 query and 1 key-value heads of 32, float32, pages of 16" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("prefill")]
    assert len(rows) == len(first["sizes"])
    assert rows[0][1:3] == ["all", "batches"] and rows[0][-1] == "kept"


@needs_kernels
def test_the_command_shortens_sizes_to_what_a_sequence_may_become(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.setattr(tune_space, "MOST_CANDIDATES", 1)
    flags = ["--phase", "decode", "--dtype", "float32", "--max-model-len", "9", "--json"]
    assert cli.main(["tune", model, *flags]) == 0
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(size.endswith(" x 9") for size in found["sizes"])


@pytest.mark.skipif(INTERPRETED, reason="there the kernels run on a CPU")
def test_the_command_refuses_a_cpu_in_one_sentence_with_a_hint(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert cli.main(["tune", model, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    first, _, rest = said.err.partition("\n\n")
    assert said.out == "" and "\n" not in first and first.startswith("error: there is nothing to tune on cpu")
    assert rest.startswith("hint: tune on a machine with a GPU")
