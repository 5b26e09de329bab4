from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tessera import cli
from tessera.attention import registry
from tessera.attention.backends.naive import Naive, NaivePart
from tessera.attention.checks import NotClaimed, Subject
from tessera.attention.checks_cuda import graph_replay, replay_problems
from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape
from tessera.attention.verify import Check, Report, base_shape, verify
from tessera.attention.workloads import WORKLOADS, Case

F32 = [torch.float32]
LIMITS = Limits(dtypes=(torch.float32, torch.bfloat16), devices=("cpu",), windows=True, soft_caps=True, sinks=True)
INVARIANT = replace(LIMITS, batch_invariant=("cpu",))


class Mutant(Naive):
    """Naive attention that a subclass breaks in one way."""

    name: ClassVar[str] = "mutant"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: LIMITS, Phase.DECODE: LIMITS}


class IgnoresWindow(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, window=None))


class IgnoresSoftCap(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, soft_cap=None))


class IgnoresSinks(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, None if sinks is None else torch.full_like(sinks, -torch.inf))


class FixedScale(Mutant):
    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, replace(shape, scale=shape.head_dim**-0.5))


class NanInPaddingRows(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        self.padding = [row for row, kv_len in enumerate(batch.kv_lens_cpu) if kv_len == 0]
        return super().plan(batch)

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        out[self.padding] = torch.nan
        return out


class WritesIntoPages(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        k[-1] = 0
        return out


class ScalesQueriesInPlace(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        out = super().run(plan, q, k, v, sinks)
        q.mul_(self.shape.scale)
        return out


class ReturnsFloat32(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, sinks).float()


class WrongForHeadsOf80(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        if self.shape.head_dim == 80:
            v = torch.cat((v[..., :64], torch.zeros_like(v[..., 64:])), -1)
        return super().run(plan, q, k, v, sinks)


class SwapsGroups(Mutant):
    """Takes every other query head for a key head, not neighbours."""

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        group = self.shape.group
        if group != 4:
            return super().run(plan, q, k, v, sinks)
        kv_heads = self.shape.num_kv_heads
        swapped = q.view(len(q), group, kv_heads, -1).transpose(1, 2).flatten(1, 2)
        out = super().run(plan, swapped, k, v, sinks)
        return out.view(len(q), kv_heads, group, -1).transpose(1, 2).flatten(1, 2)


class PagesOf16Only(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        if self.shape.page_size != 16:
            raise ValueError(f"page size {self.shape.page_size}")
        return super().plan(batch)


class DependsOnCompany(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: INVARIANT, Phase.DECODE: INVARIANT}

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q, k, v, sinks) * (1 + 2e-7 * (len(q) % 5))


class KeepsTheFirstPlan(Mutant):
    """Keeps its plan for every step with as many tokens."""

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self.plans: dict[tuple[int, ...], list[NaivePart]] = {}

    def plan(self, batch: Batch) -> list[NaivePart]:
        return self.plans.setdefault((*batch.q_lens_cpu, *batch.kv_lens_cpu), super().plan(batch))


class KeepsTheFirstLayer(Mutant):
    """Gathers keys and values once a step, as if all layers had the same."""

    def plan(self, batch: Batch) -> list[NaivePart]:
        self.pools: tuple[Tensor, Tensor] | None = None
        return super().plan(batch)

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        self.pools = self.pools or (k, v)
        return super().run(plan, q, *self.pools, sinks)


class TakesQueriesAsContiguous(Mutant):
    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return super().run(plan, q.as_strided(q.shape, (q[0].numel(), q.shape[2], 1)), k, v, sinks)


class TakesTablesAsContiguous(Mutant):
    def plan(self, batch: Batch) -> list[NaivePart]:
        table = batch.page_table
        return super().plan(replace(batch, page_table=table.as_strided(table.shape, (table.shape[1], 1))))


class AcceptsAnything(Mutant):
    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        return []


class ClaimsNothing(Mutant):
    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(())


class ClaimsAnotherKernel(Mutant):
    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(("flash_fwd_kernel",))


class NeedsAPageSize(Mutant):
    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        return super().reasons_against(phase, shape) or ([] if shape.page_size else ["no page size"])


class NotInstalled(Mutant):
    needs: ClassVar[tuple[str, ...]] = ("no_such_module_of_ours",)


class OtherDevice(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: Limits((torch.float16,), min_capability=(9, 0))}


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
        (OtherDevice, None, ["dtype torch.float32 not in", "device cpu not in ('cuda',)"]),
        (Mutant, [Phase.VISION], ["mutant has no limits for vision"]),
    ],
)
def test_what_cannot_be_used_here_fails_with_every_reason_and_nothing_is_run(
    backend: type[Mutant], phases: Sequence[Phase] | None, reasons: list[str]
) -> None:
    report = verify(backend, phases=phases, dtypes=F32)
    assert not report.passed
    assert failures(report) == {"honesty/usable"}
    assert not any(check.outcome == "pass" for check in report.checks)
    for reason in reasons:
        assert reason in report.failed[0].detail


class Replays(Naive):
    """Keeps its masks and pages outside the batch's tensors, and refreshes them before each replay."""

    def update_capture(self, plan: list[NaivePart], batch: Batch) -> None:
        plan[:] = self.plan(batch)


class FakeGraph:
    """What a CUDA graph does, on a CPU: the same call on the same tensors, into the same answer."""

    def __init__(self, bound: AttentionBackend[Any], plan: Any, static: Case) -> None:
        self.bound, self.plan, self.static = bound, plan, static
        self.out = self.call()

    def call(self) -> Tensor:
        static = self.static
        return self.bound.run(self.plan, static.q, static.k, static.v, static.sinks)

    def replay(self) -> None:
        answer = self.call()
        self.out[: len(answer)] = answer


REPLAYED = [(Phase.PREFILL, None), (Phase.PREFILL, 50), (Phase.DECODE, None), (Phase.DECODE, 50), (Phase.VISION, None)]


@pytest.mark.parametrize(("phase", "window"), REPLAYED)
def test_a_replay_with_other_lengths_and_padding_rows_must_answer_for_those(phase: Phase, window: int | None) -> None:
    def capture(bound: AttentionBackend[Any], plan: Any, static: Case) -> tuple[FakeGraph, Tensor]:
        graph = FakeGraph(bound, plan, static)
        return graph, graph.out

    base = base_shape(Naive, phase, torch.float32, "cpu")
    assert replay_problems(Subject(Replays, phase, base), window, capture) == []
    (problem,) = replay_problems(Subject(Naive, phase, base), window, capture)
    assert " in replay 1, lengths " in problem


def test_graphs_are_only_asked_where_they_are_claimed_and_on_a_gpu() -> None:
    base = base_shape(Naive, Phase.DECODE, torch.float32, "cpu")
    with pytest.raises(NotClaimed, match="the limits do not say graphs"):
        graph_replay(Subject(Mutant, Phase.DECODE, base))
    with pytest.raises(NotClaimed, match="CUDA graphs need a CUDA device, this is cpu"):
        graph_replay(Subject(WithGraphs, Phase.DECODE, base))


class WithGraphs(Mutant):
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: replace(LIMITS, graphs=True)}


def test_what_is_not_claimed_is_said_and_not_run() -> None:
    class NoWindows(Mutant):
        limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: Limits(F32, (64,), devices=("cpu",))}

    report = verify(NoWindows)
    assert report.passed
    (check,) = of_label(report, "workload/window_of_one")
    assert (check.outcome, check.detail) == ("not claimed", "no sliding window, the model has one of 1")
    (check,) = of_label(report, "head_dim/80")
    assert (check.outcome, check.detail) == ("not claimed", "head_dim 80 not in (64,)")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        EntryPoint(name, f"{__name__}:{path}", "tessera.attention")
        for name, path in {"mutant": "IgnoresWindow", "mutant:absent": "Absent"}.items()
    )
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


class Absent(NotInstalled):
    name: ClassVar[str] = "mutant:absent"


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, list[dict[str, Any]], str]:
    code = cli.main(["verify", *args, "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_command_exits_0_where_every_claim_holds(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "naive", "--phase", "decode", "--dtype", "float32")
    assert code == 0
    assert "checking decode float32" in err
    assert lines[-1]["summary"]["ok"] and lines[-1]["summary"]["versions"] == {"torch": torch.__version__}
    assert {line["check"] for line in lines[:-1] if line["check"].startswith("engine/")} == {
        "engine/greedy_tokens",
        "engine/greedy_tokens_with_window",
    }


@pytest.mark.usefixtures("registered")
def test_command_exits_1_and_the_engine_shows_other_tokens_where_the_window_is_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, lines, _ = run(capsys, "mutant", "--phase", "prefill", "--dtype", "float32")
    assert code == 1
    failed = {line["check"]: line["detail"] for line in lines[:-1] if line["outcome"] == "fail"}
    assert "workload/window_with_chunk" in failed
    assert (
        "with a window of 24 come before the first that differs from naive's"
        in failed["engine/greedy_tokens_with_window"]
    )


@pytest.mark.usefixtures("registered")
def test_command_exits_1_with_the_reasons_where_the_library_is_absent(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = run(capsys, "mutant:absent", "--dtype", "float32")
    assert code == 1
    assert "no_such_module_of_ours is not installed" in lines[0]["detail"]
    assert lines[-1]["summary"]["passed"] == 0


def test_command_exits_2_for_an_unknown_name_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, "naiv")
    assert (code, lines) == (2, [])
    assert "unknown attention backend 'naiv', there are: " in err and "hint: did you mean naive?" in err
