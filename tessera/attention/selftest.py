"""The self-test at load: a bound backend answers small batches of the model's own shape as the oracle does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from tessera.attention.contract import AttentionBackend, Phase
from tessera.attention.workloads import Workload, make_case
from tessera.errors import BackendError

_LENS = {
    Phase.PREFILL: ((33, 33), (5, 38), (1, 1), (2, 19)),
    Phase.DECODE: ((1, 7), (1, 33), (1, 1), (1, 0)),
    Phase.VISION: ((37, 37), (5, 5), (1, 1)),
}
"""Odd lengths, and where padding occurs a row of it."""
_LONGEST = 8192
"""A window longer than this is not crossed; what graphs are planned for here."""


def self_test(backends: Iterable[AttentionBackend[Any]]) -> None:
    """Raise BackendError for the first of bound `backends` that answers wrongly or not at all.

    Takes milliseconds a backend on a CPU; on a GPU it also compiles what is compiled at first use. Batches are of few
    sequences: as many as fill a GPU take a CPU ten times as long, and would have each candidate of tuning compiled
    twice. `tessera verify` asks for those (`checks.many_sequences`).
    """
    for backend in backends:
        if problem := self_test_problem(backend):
            raise BackendError(
                f"{backend.name} fails its self-test for {backend.phase} on this model's heads: {problem}",
                f"use another --{backend.phase}-attention, and see `tessera verify {backend.name}`",
            )


@torch.inference_mode()
def self_test_problem(backend: AttentionBackend[Any]) -> str | None:
    """What is wrong with a bound backend's answers on its own shape, with the worst error; None if nothing is."""
    phase, shape = backend.phase, backend.shape
    for lens, longest in _batches(backend):
        workload = Workload(lens, shape.window, 0, shape.soft_cap, shape.sinks, shape.causal)
        case = make_case(phase, workload, shape)
        if longest is not None:
            case = replace(case, batch=replace(case.batch, max_kv_len=longest))
        try:
            problems = case.problems(case.answer_of(backend))
        except Exception as error:  # a library may raise anything; whatever it is, this backend cannot serve
            problems = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        if problems:
            return f"{'; '.join(problems)} (lengths {', '.join(f'{q} of {kv}' for q, kv in lens)})"
    return None


def _batches(backend: AttentionBackend[Any]) -> list[tuple[tuple[tuple[int, int], ...], int | None]]:
    """Batches of (q_len, kv_len), each with the longest sequence that it is planned for, None for its own.

    Short ones, and one whose window has left its first tokens behind; where decodes may be recorded the short ones as a
    graph for long sequences has them, which a backend may plan otherwise.
    """
    phase, window = backend.phase, backend.shape.window
    batches: list[tuple[tuple[tuple[int, int], ...], int | None]] = [(_LENS[phase], None)]
    if window is not None and window <= _LONGEST and phase is not Phase.VISION:
        q_len = 1 if phase is Phase.DECODE else 3
        batches.append((((q_len, window + 13), (q_len, q_len)), None))
    if phase is Phase.DECODE and backend.limits[phase].graphs:
        batches.append((_LENS[phase], _LONGEST))
    return batches
