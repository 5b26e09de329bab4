"""Flex: few cases, because each one compiles for seconds."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from attention_cases import check, make_shape
from tessera.attention.backends import flex
from tessera.attention.backends.flex import MIN_TOKENS, Flex
from tessera.attention.backends.flex_tiles import Tiler
from tessera.attention.contract import Phase
from tessera.attention.reference import visible_keys
from tessera.attention.workloads import WORKLOADS, Case, Workload, make_batch, make_case

DECODES = Workload(((1, 70), (1, 3), (1, 129), (1, 40), (1, 64), (1, 1), (1, 200), (1, 17), (1, 90)))
"""One sequence more than a call on a CPU takes."""

needs_compiler = pytest.mark.skipif(bool(reasons := flex._cpu_reasons(make_shape())), reason="; ".join(reasons))


def rows_of(case: Case, rows: list[int]) -> Case:
    """These sequences of a decode, over the same pool."""
    lens = tuple((1, case.batch.kv_lens_cpu[row]) for row in rows)
    return replace(case, batch=make_batch(lens, case.batch.page_table[rows], len(case.k)), q=case.q[rows])


@needs_compiler
def test_decode_compiles_once_and_runs_the_kernel_it_claims() -> None:
    case = make_case(Phase.DECODE, DECODES, make_shape())
    bound = Flex(Phase.DECODE, case.shape)
    assert case.problems(case.answer_of(bound)) == []
    compiled = counters["stats"]["unique_graphs"]
    for rows in ([0], [1, 2], [8, 6, 4], list(range(9)), [5]):
        step = rows_of(case, rows)
        assert step.problems(step.answer_of(bound)) == []
    assert counters["stats"]["unique_graphs"] == compiled
    plan = bound.plan(case.batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        bound.run(plan, case.q, case.k, case.v)
    names = [event.key for event in profiler.key_averages()]
    claim = Flex.claim(Phase.DECODE, case.shape)
    assert all(any(re.search(pattern, name) for name in names) for pattern in claim.must)
    assert not any(re.search(pattern, name) for pattern in claim.must_not for name in names)


@pytest.mark.parametrize("phase", list(Phase))
def test_run_builds_no_mask_of_its_own(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are in the plan, over the whole pool; without a kernel, since only its caller is asked."""
    case = make_case(phase, Workload(((1, 1),) if phase is Phase.DECODE else ((5, 5),)), make_shape())
    bound = Flex(phase, case.shape)
    plan = bound.plan(case.batch)
    num_slots = MIN_TOKENS if phase is Phase.VISION else case.k.shape[0] * case.k.shape[1]
    assert [mask.seq_lengths[1] for mask in plan.masks] == [num_slots]
    given: list[Any] = []

    def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, _: Any) -> torch.Tensor:
        given.append(mask)
        assert keys.shape == values.shape and keys.shape[2] == num_slots
        return queries

    monkeypatch.setattr(Tiler, "block_masks", None)
    monkeypatch.setattr(bound, "_attend", lambda *_: attend)
    for _ in range(2):
        bound.run(plan, case.q, case.k, case.v)
    assert [id(mask) for mask in given] == [id(mask) for mask in plan.masks] * 2


@needs_compiler
@torch.inference_mode()
def test_prefill_with_window_and_soft_cap_equals_the_oracle() -> None:
    lens = ((100, 100), (17, 17), (150, 300), (1, 50))
    check(make_case(Phase.PREFILL, Workload(lens, window=33, soft_cap=5.0, query_scale=4.0), make_shape()), Flex)


@needs_compiler
def test_vision_equals_the_oracle() -> None:
    check(make_case(Phase.VISION, WORKLOADS[Phase.VISION]["ragged"], make_shape()), Flex)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in Phase for name in WORKLOADS[phase]])
def test_every_workload_equals_the_oracle(phase: Phase, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(phase, WORKLOADS[phase][name], make_shape(dtype=dtype))
        if reasons := Flex.reasons_against(phase, case.shape):
            assert case.shape.sinks and all("sinks" in reason for reason in reasons)
        else:
            check(case, Flex)


@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in Phase for name in WORKLOADS[phase]])
def test_block_mask_lists_every_visible_key_and_calls_no_page_whole_that_is_not(phase: Phase, name: str) -> None:
    """What the kernel would attend to, worked out without a kernel."""
    case = make_case(phase, WORKLOADS[phase][name], make_shape())
    tiler = Tiler(phase, case.shape)
    tiles = tiler.tiles(case.batch)
    num_slots = len(case.k) if phase is Phase.VISION else case.k.shape[0] * case.k.shape[1]
    num_pages = -(-num_slots // tiler.page_size)
    seen = torch.cat([_seen(mask) for mask in tiler.block_masks(tiles, num_pages)])[tiles.back]
    token = 0
    for row, (q_len, kv_len) in enumerate(zip(case.batch.q_lens_cpu, case.batch.kv_lens_cpu)):
        if kv_len:
            place = torch.arange(kv_len)
            if phase is Phase.VISION:
                slots = token + place
            else:
                slots = case.batch.page_table[row].long()[place // tiler.page_size] * tiler.page_size
                slots += place % tiler.page_size
            wanted = torch.zeros(q_len, num_pages * tiler.page_size, dtype=torch.bool)
            wanted[:, slots] = visible_keys(case.shape, q_len, kv_len)
            assert torch.equal(seen[token : token + q_len], wanted)
        token += q_len


def _seen(mask: Any) -> torch.Tensor:
    """[tiles * queries, slots] bool"""
    num_tiles, page_size = mask.kv_num_blocks.shape[0], mask.BLOCK_SIZE[1]
    num_queries, num_slots = mask.seq_lengths
    partial, whole = torch.zeros(2, num_tiles, num_slots // page_size, dtype=torch.bool)
    for kind, counts, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (whole, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(num_tiles):
            kind[row, indices[row, 0, 0, : counts[row, 0, 0]].long()] = True
    assert not (partial & whole).any()
    tile, query = torch.arange(num_tiles)[:, None, None], torch.arange(num_queries)[None, :, None]
    asked = mask.mask_mod(tile, torch.tensor(0), query, torch.arange(num_slots))
    partial, whole = (x.repeat_interleave(page_size, 1)[:, None] for x in (partial, whole))
    seen: torch.Tensor = (partial & asked) | whole
    return seen.expand(-1, num_queries, -1).flatten(0, 1)


def test_without_a_compiler_it_is_refused_and_not_run_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_has_compiler", lambda: False)
    for phase in Phase:
        shape = WORKLOADS[phase]["large_logits"].bind(phase, make_shape())
        assert "torch.compile needs a C++ compiler on a CPU" in Flex.reasons_against(phase, shape)


def test_sinks_are_refused_on_a_cpu() -> None:
    (reason,) = Flex.reasons_against(Phase.DECODE, make_shape(sinks=True))
    assert reason == "no attention sinks on a CPU: torch does not return the logsumexp there"
