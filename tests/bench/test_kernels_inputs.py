"""Inputs of kernels and the way they are called: the same for everyone, and as in the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tessera.attention import registry
from tessera.attention.contract import Phase, Shape
from tessera.attention.reference import reference_attention
from tessera.attention.timing import FLUSH_BYTES
from tessera.bench.kernels.cases import Part, parse_workload
from tessera.bench.kernels.inputs import expected_of, make_part_inputs, num_copies
from tessera.bench.kernels.timing import Cold, uses_graph


def test_what_empties_the_caches_is_larger_than_they_are() -> None:
    assert Cold("cpu").memory.nbytes == FLUSH_BYTES == 2**28


@pytest.mark.parametrize(("phase", "window"), [(Phase.PREFILL, None), (Phase.PREFILL, 9), (Phase.VISION, None)])
def test_what_is_checked_of_a_large_case_is_what_the_oracle_says_of_the_whole(
    phase: Phase, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = phase is Phase.PREFILL
    part = Part(phase, parse_workload("3q100_q70s90" if paged else "3q100_q70"))
    page_size = 16 if paged else None
    shape = Shape(4, 2, 32, 0.2, torch.float32, "cpu", page_size=page_size, window=window, causal=paged)
    inputs = make_part_inputs(part, shape, 1, 0)
    q, k, v, _ = inputs.copies[0]
    whole = reference_attention(phase, shape, inputs.batch, q, k, v)
    assert len(expected_of(part, inputs).rows) == 370
    monkeypatch.setattr("tessera.bench.kernels.inputs.CHECK_SCORES", 10)
    some = expected_of(part, inputs)
    assert 0 < len(some.rows) < 250 and {0, 369} <= set(some.rows.tolist())
    torch.testing.assert_close(some.answer, whole[some.rows])


@pytest.mark.parametrize(
    ("phase", "mode", "device", "graph"),
    [
        (Phase.DECODE, "engine", "cuda", True),
        (Phase.PREFILL, "engine", "cuda", False),
        (Phase.DECODE, "eager", "cuda", False),
        (Phase.PREFILL, "graph", "cuda", True),  # where it is asked for
        (Phase.VISION, "graph", "cuda", False),  # triton's limits allow none there
        (Phase.DECODE, "engine", "cpu", False),
    ],
)
def test_graphs_are_for_decoding_as_in_the_engine(phase: Phase, mode: str, device: str, graph: bool) -> None:
    triton = registry.class_of("triton")
    assert triton is not None
    part = Part(phase, parse_workload("q1s8" if phase is Phase.DECODE else "q8"))
    assert uses_graph(triton, part, mode, device) == graph


def test_a_graph_reads_as_many_copies_as_memory_allows_and_a_single_call_another_than_its_warm_up() -> None:
    shape = Shape(32, 8, 128, 0.2, torch.bfloat16, "cuda", page_size=16)
    small, large = (Part(Phase.DECODE, parse_workload(text)) for text in ("8q1s512", "256q1s32k"))
    assert num_copies(small, shape, graph=True) == 8
    assert num_copies(large, shape, graph=True) == num_copies(large, shape, graph=False) == 1
    assert num_copies(small, shape, graph=False) == 2
    assert num_copies(small, replace(shape, device_type="cpu"), graph=False) == 1


def test_the_seed_decides_the_inputs_and_no_two_pages_are_alike() -> None:
    part = Part(Phase.DECODE, parse_workload("2q1s100"))
    shape = Shape(4, 2, 32, 0.2, torch.float32, "cpu", page_size=16)
    one, same, other = (make_part_inputs(part, shape, 1, seed) for seed in (1, 1, 2))
    for mine, its in zip(one.copies[0][:3], same.copies[0][:3]):
        assert mine is not None and its is not None and torch.equal(mine, its)
    assert not torch.equal(one.copies[0][1], other.copies[0][1])
    pages = {tuple(page.tolist()) for page in one.copies[0][1].flatten(1)}
    assert len(pages) == one.batch.num_pages == 14
