from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from fake_graph import capture_fake
from mutants import (
    AcceptsAnything,
    ClaimsAnotherKernel,
    ClaimsNothing,
    DecodeHere,
    DependsOnCompany,
    FailsToImport,
    FixedScale,
    IgnoresSinks,
    IgnoresSoftCap,
    IgnoresWindow,
    KeepsTheFirstLayer,
    KeepsTheFirstPlan,
    Mutant,
    NanInPaddingRows,
    NeedsAPageSize,
    NotInstalled,
    NoUsualSize,
    OtherDevice,
    PagesOf16Only,
    RaisesWhenAsked,
    RefusesFloat32,
    ReturnsFloat32,
    ScalesQueriesInPlace,
    SwapsGroups,
    TakesQueriesAsContiguous,
    TakesTablesAsContiguous,
    WithGraphs,
    WritesIntoPages,
    WrongForHeadsOf80,
)
from tessera.attention.backends.naive import Naive, NaivePart
from tessera.attention.checks import NotClaimed, Subject
from tessera.attention.checks_cuda import graph_replay, replay_problems
from tessera.attention.contract import Batch, Limits, Phase
from tessera.attention.verify import Check, Report, base_shape, verify
from tessera.attention.workloads import WORKLOADS

F32 = [torch.float32]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and wait for one another where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failures(report: Report) -> set[str]:
    return {check.label for check in report.failed}


def of_label(report: Report, label: str) -> list[Check]:
    return [check for check in report.checks if check.label == label]


def test_naive_keeps_every_claim_in_every_phase() -> None:
    report = verify(Naive, dtypes=[torch.float32, torch.bfloat16])
    assert report.passed, report.failed
    assert {check.phase for check in report.checks} == set(Phase)
    for phase, workloads in WORKLOADS.items():
        ran = {check.name for check in report.checks if check.phase == phase and check.kind == "workload"}
        assert ran == set(workloads)


WINDOWS = ["workload/window_shorter_than_context", "workload/window_of_one", "workload/sinks_with_window"]
BROKEN: list[tuple[type[Mutant], Phase, list[str]]] = [
    (IgnoresWindow, Phase.DECODE, [*WINDOWS, "use/random_batches"]),
    (IgnoresSoftCap, Phase.DECODE, ["workload/soft_cap"]),
    (IgnoresSoftCap, Phase.PREFILL, ["workload/soft_cap"]),
    (IgnoresSinks, Phase.DECODE, ["workload/sinks", "workload/sinks_with_window"]),
    (FixedScale, Phase.DECODE, ["use/scale"]),
    (NanInPaddingRows, Phase.DECODE, ["workload/padding_rows", "use/changing_steps"]),
    (WrongForHeadsOf80, Phase.DECODE, ["head_dim/80"]),
    (SwapsGroups, Phase.PREFILL, ["group/4"]),
    (PagesOf16Only, Phase.DECODE, ["page_size/1", "page_size/32", "page_size/64", "page_size/128", "page_size/256"]),
    (DependsOnCompany, Phase.DECODE, ["invariance/company"]),
    (DependsOnCompany, Phase.PREFILL, ["invariance/company"]),
    (KeepsTheFirstPlan, Phase.DECODE, ["use/changing_steps"]),
    (KeepsTheFirstPlan, Phase.PREFILL, ["use/changing_steps"]),
    (KeepsTheFirstLayer, Phase.DECODE, ["use/one_plan_for_all_layers"]),
    (TakesQueriesAsContiguous, Phase.PREFILL, ["use/strided_inputs"]),
    (TakesTablesAsContiguous, Phase.DECODE, ["use/wide_page_table"]),
    (AcceptsAnything, Phase.DECODE, ["honesty/refusals"]),
    (ClaimsNothing, Phase.DECODE, ["honesty/claim", "proof/kernels"]),
    (ClaimsAnotherKernel, Phase.DECODE, ["proof/kernels"]),
    (NeedsAPageSize, Phase.DECODE, ["honesty/open_page_size"]),
]


@pytest.mark.parametrize(
    ("backend", "phase", "labels"), BROKEN, ids=[f"{backend.__name__}-{phase}" for backend, phase, _ in BROKEN]
)
def test_a_broken_backend_fails_the_check_of_what_it_breaks_and_no_other(
    backend: type[Mutant], phase: Phase, labels: list[str]
) -> None:
    report = verify(backend, phases=[phase], dtypes=F32)
    assert failures(report) == set(labels)
    assert not report.passed
    for check in report.failed:
        assert check.detail.startswith("mutant claims ") and f"in {phase} of float32 on cpu, but " in check.detail


@pytest.mark.parametrize(
    ("backend", "phase", "tensor"), [(WritesIntoPages, Phase.DECODE, "k"), (ScalesQueriesInPlace, Phase.PREFILL, "q")]
)
def test_what_is_handed_over_must_not_be_written(backend: type[Mutant], phase: Phase, tensor: str) -> None:
    report = verify(backend, phases=[phase], dtypes=F32)
    (check,) = of_label(report, "use/unchanged_inputs")
    assert check.outcome == "fail"
    assert f"numbers of {tensor} were overwritten" in check.detail


def test_the_window_that_is_ignored_is_named_with_values() -> None:
    report = verify(IgnoresWindow, phases=[Phase.PREFILL], dtypes=F32)
    (check,) = of_label(report, "workload/window_with_chunk")
    assert check.detail.startswith(
        "mutant claims a sliding window of 33 over sequences of (q_len, kv_len) (40, 100), (10, 500), (5, 12) in "
        "prefill of float32 on cpu, but error "
    )


def test_a_wrong_dtype_fails_every_workload() -> None:
    report = verify(ReturnsFloat32, phases=[Phase.DECODE], dtypes=[torch.bfloat16])
    assert {f"workload/{name}" for name in WORKLOADS[Phase.DECODE]} <= failures(report)
    (check,) = of_label(report, "workload/one_token")
    assert check.detail.endswith("but returned torch.float32 (1, 6, 64), not torch.bfloat16 (1, 6, 64)")


@pytest.mark.parametrize(
    ("backend", "phases", "reasons"),
    [
        (NotInstalled, None, ["no_such_module_of_ours is not installed"]),
        (NotInstalled, [Phase.DECODE, Phase.VISION], ["no_such_module_of_ours is not installed"]),
        (OtherDevice, None, ["device cpu not in ('cuda',)"]),
        (FailsToImport, None, ["import wheel_that_does_not_import fails: undefined symbol"]),
    ],
)
@pytest.mark.usefixtures("wheel_that_does_not_import")
def test_what_cannot_be_used_here_is_unavailable_with_every_reason_and_nothing_is_run(
    backend: type[Mutant], phases: Sequence[Phase] | None, reasons: list[str]
) -> None:
    report = verify(backend, phases=phases)
    assert report.unavailable == reasons
    assert report.checks == [] and not report.passed


@pytest.fixture
def wheel_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheel_that_does_not_import.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_what_can_be_used_in_one_phase_is_verified_in_that_phase() -> None:
    report = verify(DecodeHere, dtypes=F32)
    assert report.passed and report.unavailable == []
    assert {check.phase for check in report.checks if check.outcome == "pass"} == {Phase.DECODE}
    asked = verify(DecodeHere, phases=[Phase.PREFILL], dtypes=F32)
    assert asked.unavailable == ["device cpu not in ('cuda',)"]
    both = verify(DecodeHere, phases=[Phase.PREFILL, Phase.DECODE], dtypes=F32)
    assert failures(both) == {"honesty/usable"} and both.failed[0].phase == Phase.PREFILL  # asked for, not to be had


def test_a_type_that_is_refused_here_is_no_failure_unless_it_is_asked_for() -> None:
    whole = verify(RefusesFloat32, phases=[Phase.DECODE])
    asked = verify(RefusesFloat32, phases=[Phase.DECODE], dtypes=F32)
    assert failures(asked) == {"honesty/usable"} and asked.unavailable == []
    assert {check.dtype for check in whole.checks if check.outcome == "pass"} == {"bfloat16"}


@pytest.mark.parametrize(
    ("backend", "phases", "reason"),
    [
        (Mutant, [Phase.VISION], "mutant has no limits for vision"),
        (NoUsualSize, [Phase.DECODE], "head_dim 64 not in (48,)"),
        (RaisesWhenAsked, None, "reasons_against raises ValueError: broken"),
    ],
)
def test_what_is_the_backends_own_fault_is_a_failure(
    backend: type[Mutant], phases: Sequence[Phase] | None, reason: str
) -> None:
    report = verify(backend, phases=phases, dtypes=F32)
    assert report.unavailable == [] and failures(report) == {"honesty/usable"}
    assert reason in report.failed[0].detail


class Replays(Naive):
    """Keeps its masks and pages outside the batch's tensors, and refreshes them before each replay."""

    def update_capture(self, plan: list[NaivePart], batch: Batch) -> None:
        plan[:] = self.plan(batch)


REPLAYED = [(Phase.PREFILL, None), (Phase.PREFILL, 50), (Phase.DECODE, None), (Phase.DECODE, 50), (Phase.VISION, None)]


@pytest.mark.parametrize(("phase", "window"), REPLAYED)
def test_a_replay_with_other_lengths_and_padding_rows_must_answer_for_those(phase: Phase, window: int | None) -> None:
    base = base_shape(Naive, phase, torch.float32, "cpu")
    assert replay_problems(Subject(Replays, phase, base), window, capture_fake) == []
    (problem,) = replay_problems(Subject(Naive, phase, base), window, capture_fake)
    assert " in replay 1, lengths " in problem


def test_graphs_are_only_asked_where_they_are_claimed_and_on_a_gpu() -> None:
    base = base_shape(Naive, Phase.DECODE, torch.float32, "cpu")
    with pytest.raises(NotClaimed, match="the limits do not say graphs"):
        graph_replay(Subject(Mutant, Phase.DECODE, base))
    with pytest.raises(NotClaimed, match="CUDA graphs need a CUDA device, this is cpu"):
        graph_replay(Subject(WithGraphs, Phase.DECODE, base))


def test_what_is_not_claimed_is_said_and_not_run() -> None:
    class NoWindows(Mutant):
        limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: Limits(F32, (64,), devices=("cpu",))}

    report = verify(NoWindows)
    assert report.passed
    (check,) = of_label(report, "workload/window_of_one")
    assert (check.outcome, check.detail) == ("not claimed", "no sliding window, the model has one of 1")
    (check,) = of_label(report, "head_dim/80")
    assert (check.outcome, check.detail) == ("not claimed", "head_dim 80 not in (64,)")
