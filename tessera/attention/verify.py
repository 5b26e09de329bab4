"""The conformance kit: does a backend keep what its limits claim, and refuse what they leave out?

Every answer is held against the oracle (`reference`), on inputs made to expose what usually goes wrong: shuffled
pages with garbage around the live tokens, odd lengths, strided queries, instances that serve step after step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from tessera.attention import checks, checks_cuda, checks_honesty
from tessera.attention.checks import NotClaimed, Problems, Subject
from tessera.attention.contract import AttentionBackend, Limits, Phase, Shape
from tessera.attention.workloads import DRAFTS, TOLERANCE, WORKLOADS

HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 160, 256, 512)
GROUPS = (1, 2, 3, 4, 7, 8, 16)
PAGE_SIZES = (16, 32, 64, 128, 256)
BASE_HEAD_DIMS, BASE_GROUPS = (64, 32, 128, 96, 80, 256, 72, 112, 160), (3, 2, 4, 1, 8, 7, 16)
"""Sizes of every check that is about something else: the first that the backend claims."""

Outcome = Literal["pass", "fail", "not claimed"]
Test = Callable[[Subject], Problems]


@dataclass(frozen=True)
class Check:
    """One thing a backend claims, and whether it holds."""

    phase: str
    dtype: str
    kind: str
    """workload, drafts, head_dim, group, page_size, use, graph, invariance, proof, honesty or engine."""
    name: str
    outcome: Outcome
    detail: str = ""
    """Of a failure: which claim failed, with values. Of what is not claimed: every reason."""
    seconds: float = 0.0

    @property
    def label(self) -> str:
        """The check's name in full: `workload/ragged`."""
        return f"{self.kind}/{self.name}"


@dataclass
class Report:
    """All checks of one backend on one device."""

    backend: str
    device: str
    checks: list[Check] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    """Every reason why it cannot be used here in any phase that was asked for; nothing was checked then."""

    @property
    def failed(self) -> list[Check]:
        """The claims that do not hold."""
        return [check for check in self.checks if check.outcome == "fail"]

    @property
    def passed(self) -> bool:
        """Whether something was checked, and nothing failed."""
        return not self.failed and any(check.outcome == "pass" for check in self.checks)


def verify(
    backend: type[AttentionBackend[Any]],
    *,
    phases: Sequence[Phase] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device_type: str = "cpu",
    on_check: Callable[[Check], None] = lambda _: None,
) -> Report:
    """Run every check on `backend`, phase by phase, type by type.

    phases    left out: those the backend has limits for; one that is named and not claimed is a failure
    dtypes    left out: those of float32, bfloat16 and float16 that it claims; likewise
    on_check  called after each check, for progress

    A backend that cannot be used here in any of these phases is `unavailable`, and nothing is run. One that can
    in some of them is verified there. Whatever it raises is a failed check; nothing is raised.
    """
    report = Report(backend.name, device_type)
    report.unavailable = unavailable(backend, list(phases or Phase), device_type)
    if report.unavailable:
        return report

    def add(check: Check) -> None:
        report.checks.append(check)
        on_check(check)

    for phase in Phase:
        if phases is None or phase in phases:
            # What a backend cannot do here is no failure unless it was asked for, as long as it does something.
            for check in _phase_checks(backend, phase, dtypes, device_type, asked_for=phases is not None):
                add(check)
    return report


def unavailable(backend: type[AttentionBackend[Any]], phases: Sequence[Phase], device_type: str) -> list[str]:
    """Why nothing of what `backend` claims in `phases` can be used here, each reason once; empty if something can.

    Empty too where the backend is at fault: no limits, limits without a usual size, reasons that raise.
    """
    found: dict[str, None] = {}
    for phase in (phase for phase in phases if phase in backend.limits):
        for dtype in (dtype for dtype in TOLERANCE if dtype in backend.limits[phase].dtypes):
            shape = base_shape(backend, phase, dtype, device_type)
            try:
                reasons = backend.reasons_against(phase, shape)
            except Exception:  # a backend may raise anything: that is a claim not kept
                return []
            if not reasons or backend.limits[phase].problems(_where_it_belongs(backend.limits[phase], shape)):
                return []
            found |= dict.fromkeys(reasons)
    return list(found)


def dtype_name(dtype: torch.dtype) -> str:
    """float32, and so on."""
    return str(dtype).removeprefix("torch.")


def base_shape(backend: type[AttentionBackend[Any]], phase: Phase, dtype: torch.dtype, device_type: str) -> Shape:
    """The first usual sizes that the backend claims in `phase`; sizes it never claims where it claims no usual ones."""
    limits = backend.limits[phase]
    head_dim = next((size for size in BASE_HEAD_DIMS if size in limits.head_dims), BASE_HEAD_DIMS[0])
    group = next((size for size in BASE_GROUPS if size in limits.groups), BASE_GROUPS[0])
    on_cuda = device_type == "cuda" and torch.cuda.is_available()
    return Shape(
        num_q_heads=2 * group,
        num_kv_heads=2,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        dtype=dtype,
        device_type=device_type,
        capability=torch.cuda.get_device_capability() if on_cuda else (0, 0),
        page_size=None if phase is Phase.VISION else next(iter(_page_sizes(limits)), PAGE_SIZES[0]),
        causal=phase is not Phase.VISION,
        shared_memory=_shared_memory() if on_cuda else 0,
    )


def _where_it_belongs(limits: Limits, shape: Shape) -> Shape:
    """The shape on a device that the limits name, so that only its sizes can be against it."""
    device_type = next((device for device in ("cuda", "cpu") if device in limits.devices), shape.device_type)
    causal = shape.causal or shape.page_size is None  # seeing both ways is what VISION is
    return replace(shape, device_type=device_type, capability=limits.min_capability, shared_memory=0, causal=causal)


def _phase_checks(
    backend: type[AttentionBackend[Any]],
    phase: Phase,
    dtypes: Sequence[torch.dtype] | None,
    device_type: str,
    *,
    asked_for: bool,
) -> Iterator[Check]:
    """Of a phase or type that cannot be used a failure if it was asked for, else that it is not claimed."""
    if phase not in backend.limits:
        outcome: Outcome = "fail" if asked_for else "not claimed"
        yield Check(phase, "-", "honesty", "usable", outcome, f"{backend.name} has no limits for {phase}")
        return
    limits, first = backend.limits[phase], True
    for dtype in TOLERANCE if dtypes is None else dtypes:
        if dtypes is None and dtype not in limits.dtypes:
            detail = f"dtype {dtype_name(dtype)} is not among those of {phase}"
            yield Check(phase, dtype_name(dtype), "honesty", "usable", "not claimed", detail)
            continue
        subject = Subject(backend, phase, base_shape(backend, phase, dtype, device_type))
        of_type = dtypes is not None and not unavailable(backend, [phase], device_type)
        outcome = "fail" if asked_for or of_type else "not claimed"
        try:
            reasons = backend.reasons_against(phase, subject.base)
        except Exception as error:  # as above
            outcome, reasons = "fail", [f"reasons_against raises {type(error).__name__}: {error}"]
        if reasons:
            detail = f"{backend.name} cannot serve {phase} here: {'; '.join(reasons)}"
            yield Check(phase, dtype_name(dtype), "honesty", "usable", outcome, detail)
            continue
        tests = _tests(limits, phase) if first else (test for test in _tests(limits, phase) if test[0] != "honesty")
        first = False
        for kind, name, words, test in tests:
            yield _run(subject, kind, name, words, test)


def _tests(limits: Limits, phase: Phase) -> Iterator[tuple[str, str, str, Test]]:
    """Kind, name, what is claimed in words, and the check itself."""
    yield "honesty", "identity", "a name and the packages that decide what runs", checks_honesty.identity
    yield "honesty", "claim", "which kernels it launches", checks_honesty.claim
    yield "honesty", "refusals", "that its limits are its limits", checks_honesty.refusals
    yield (
        "honesty",
        "open_page_size",
        "an answer before a page size is chosen",
        checks_honesty.open_page_size,
    )
    for name, asked in WORKLOADS[phase].items():
        yield "workload", name, checks.describe(asked), partial(checks.workload, asked=asked)
    for name, asked in DRAFTS.items() if phase is Phase.DECODE else ():
        yield "drafts", name, checks.describe(asked), partial(checks.workload, asked=asked)
    for size in HEAD_DIMS:
        yield "head_dim", str(size), f"head_dim {size}", partial(checks.head_dim, size=size)
    for size in GROUPS:
        yield "group", str(size), f"{size} query heads a key-value head", partial(checks.group, size=size)
    if phase is not Phase.VISION:
        for size in _page_sizes(limits) or PAGE_SIZES:
            yield "page_size", str(size), f"pages of {size}", partial(checks.page_size, size=size)
    yield "use", "scale", "a scale other than 1/sqrt(head_dim)", checks.scale
    yield "use", "random_batches", "sequences of any length", checks.random_batches
    if phase is Phase.DECODE:
        yield "use", "many_sequences", "as many sequences as fill a GPU", checks.many_sequences
    yield "use", "strided_inputs", "inputs that are slices of wider tensors", checks.strided_inputs
    if phase is not Phase.VISION:
        yield "use", "wide_page_table", "a page table that is a slice of a buffer", checks.wide_page_table
    yield "use", "changing_steps", "one instance for steps of any size", checks.changing_steps
    yield "use", "one_plan_for_all_layers", "one plan for every layer of a step", checks.one_plan_for_all_layers
    yield "use", "unchanged_inputs", "that it never writes what it is given", checks.unchanged_inputs
    yield (
        "invariance",
        "company",
        "bits that depend on no other sequence (batch_invariant)",
        checks.batch_invariance,
    )
    yield "proof", "kernels", "which kernels it launches", checks_honesty.proof
    yield "graph", "replay", "that a CUDA graph may record run() (graphs)", checks_cuda.graph_replay
    if phase is not Phase.VISION:
        windowed = partial(checks_cuda.graph_replay, window=50)
        yield "graph", "replay_with_window", "that a CUDA graph may record run() with a sliding window", windowed
    yield "graph", "no_wait", "that run() only launches", checks_cuda.no_wait


def _run(subject: Subject, kind: str, name: str, words: str, test: Test) -> Check:
    backend, phase, dtype = subject.backend.name, subject.phase, dtype_name(subject.base.dtype)
    outcome: Outcome = "pass"
    detail, started = "", time.perf_counter()
    try:
        if problems := test(subject):
            outcome, detail = "fail", "; ".join(problems)
    except NotClaimed as reason:
        outcome, detail = "not claimed", str(reason)
    except Exception as error:  # a backend may raise anything: that is a claim not kept
        raised = " ".join(str(error).split())[:300]
        outcome, detail = "fail", f"{type(error).__name__} was raised: {raised}"
    if outcome == "fail":
        detail = f"{backend} claims {words} in {phase} of {dtype} on {subject.base.device_type}, but {detail}"
    return Check(phase, dtype, kind, name, outcome, detail, time.perf_counter() - started)


def _page_sizes(limits: Limits) -> list[int]:
    """Usual page sizes that are claimed, and the smallest of all that are."""
    usual = [size for size in PAGE_SIZES if size in limits.page_sizes]
    smallest = next((size for size in range(1, PAGE_SIZES[0]) if size in limits.page_sizes), None)
    if not usual and smallest is None:
        smallest = next((size for size in range(PAGE_SIZES[0], 4097) if size in limits.page_sizes), None)
    return usual + ([smallest] if smallest is not None else [])


def _shared_memory() -> int:
    """Bytes of shared memory that one block may ask for."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "shared_memory_per_block_optin", 0))
