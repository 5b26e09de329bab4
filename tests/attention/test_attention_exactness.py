from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attention_workloads import Case, Workload, make_batch, make_case, make_shape
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.contract import Phase

LENS = {
    Phase.DECODE: [(1, n) for n in (5, 60, 64, 65, 90, 128, 129, 130, 300, 301, 512, 513, 700, 1024)],
    Phase.PREFILL: [(5, 5), (33, 33), (64, 100), (200, 200), (1, 90), (300, 400), (31, 600)],
}


def answer_of_rows(case: Case, phase: Phase, rows: list[int]) -> list[Tensor]:
    """The answer of each of these sequences, when they alone form the batch."""
    queries = torch.split(case.q, case.batch.q_lens_cpu)
    lens = tuple((case.batch.q_lens_cpu[row], case.batch.kv_lens_cpu[row]) for row in rows)
    batch = make_batch(lens, case.batch.page_table[rows])
    part = replace(case, batch=batch, q=torch.cat([queries[row] for row in rows]))
    return list(torch.split(part.answer(TorchSdpa, phase), batch.q_lens_cpu))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("heads", [(9, 3), (12, 12), (8, 4), (8, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_sequence_is_computed_alike_to_the_last_bit_whatever_else_is_in_the_batch(
    phase: Phase, heads: tuple[int, int], window: int | None
) -> None:
    lens = LENS[phase] * 2
    shape = make_shape(q_heads=heads[0], kv_heads=heads[1], head_dim=64, window=window)
    case = make_case(Workload(tuple(lens), window), shape)
    alone = [answer_of_rows(case, phase, [row])[0] for row in range(len(lens))]
    shuffle = random.Random(0)
    for size in (len(lens), 2, 7, 8, 3):
        rows = shuffle.sample(range(len(lens)), size)
        for row, answer in zip(rows, answer_of_rows(case, phase, rows)):
            assert torch.equal(answer, alone[row]), f"sequence of {lens[row]} among {size}"


@pytest.mark.parametrize("heads", [(9, 3), (12, 12)], ids=str)
@pytest.mark.parametrize("phase", list(Phase))
def test_pages_read_in_place_and_pages_gathered_give_the_same_bits(phase: Phase, heads: tuple[int, int]) -> None:
    for lens in LENS[phase]:
        shape = make_shape(q_heads=heads[0], kv_heads=heads[1], head_dim=64)
        case = make_case(Workload((lens,)), shape, ordered_pages=True)
        moved = torch.randperm(len(case.k_pages), generator=torch.Generator().manual_seed(1))
        table = moved.argsort()[case.batch.page_table.long()].int()
        scattered = replace(
            case,
            batch=replace(case.batch, page_table=table),
            k_pages=case.k_pages[moved],
            v_pages=case.v_pages[moved],
        )
        assert torch.equal(case.answer(TorchSdpa, phase), scattered.answer(TorchSdpa, phase))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_runs_the_fused_kernel_and_not_the_math_path(phase: Phase, window: int | None, dtype: torch.dtype) -> None:
    case = make_case(Workload(tuple(LENS[phase]), window), make_shape(dtype=dtype, window=window))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        case.answer(TorchSdpa, phase)
    operators = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    assert not {"aten::_scaled_dot_product_attention_math", "aten::bmm", "aten::_softmax"} & operators


def test_keys_are_never_repeated_for_the_query_heads_that_share_them() -> None:
    case = make_case(Workload(((400, 400), (200, 500))), make_shape(q_heads=8, kv_heads=1, head_dim=64))
    bound = TorchSdpa(Phase.PREFILL, case.shape)
    plan = bound.plan(case.batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        bound.run(plan, case.q, case.k_pages, case.v_pages)
    assert "aten::clone" not in {event.key for event in profiler.key_averages()}
