from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from attention_cases import PAGED, make_shape
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.contract import Phase
from tessera.attention.workloads import Case, Workload, make_batch, make_case

LENS = {
    Phase.DECODE: [(1, n) for n in (5, 60, 64, 65, 90, 128, 129, 130, 300, 301, 512, 513, 700, 1024)],
    Phase.PREFILL: [(5, 5), (33, 33), (64, 100), (200, 200), (1, 90), (300, 400), (31, 600)],
    Phase.VISION: [(5, 5), (64, 64), (64, 64), (64, 64), (1, 1), (196, 196), (333, 333)],
}


def answer_of_rows(case: Case, rows: list[int]) -> list[Tensor]:
    """The answer of each of these sequences, when they alone form the batch."""
    lens = tuple((case.batch.q_lens_cpu[row], case.batch.kv_lens_cpu[row]) for row in rows)
    batch = make_batch(lens, case.batch.page_table[rows], case.batch.num_pages)
    part = replace(case, batch=batch, q=rows_of(case, case.q, rows))
    if case.phase is Phase.VISION:
        part = replace(part, k=rows_of(case, case.k, rows), v=rows_of(case, case.v, rows))
    return list(torch.split(part.answer(TorchSdpa), batch.q_lens_cpu))


def rows_of(case: Case, packed: Tensor, rows: list[int]) -> Tensor:
    parts = torch.split(packed, case.batch.q_lens_cpu)
    return torch.cat([parts[row] for row in rows])


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("heads", [(9, 3), (12, 12), (8, 4), (8, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_sequence_is_computed_alike_to_the_last_bit_whatever_else_is_in_the_batch(
    phase: Phase, heads: tuple[int, int], window: int | None
) -> None:
    if phase is Phase.VISION and window is not None:
        pytest.skip("images have no window")
    lens = LENS[phase] * 2
    case = make_case(phase, Workload(tuple(lens), window), make_shape(q_heads=heads[0], kv_heads=heads[1], head_dim=64))
    alone = [answer_of_rows(case, [row])[0] for row in range(len(lens))]
    shuffle = random.Random(0)
    for size in (len(lens), 2, 7, 8, 3):
        rows = shuffle.sample(range(len(lens)), size)
        for row, answer in zip(rows, answer_of_rows(case, rows)):
            assert torch.equal(answer, alone[row]), f"sequence of {lens[row]} among {size}"


@pytest.mark.parametrize("heads", [(9, 3), (12, 12)], ids=str)
@pytest.mark.parametrize("phase", PAGED)
def test_pages_read_in_place_and_pages_gathered_give_the_same_bits(phase: Phase, heads: tuple[int, int]) -> None:
    for lens in LENS[phase]:
        shape = make_shape(q_heads=heads[0], kv_heads=heads[1], head_dim=64)
        case = make_case(phase, Workload((lens,)), shape, ordered_pages=True)
        moved = torch.randperm(len(case.k), generator=torch.Generator().manual_seed(1))
        table = moved.argsort()[case.batch.page_table.long()].int()
        scattered = replace(case, batch=replace(case.batch, page_table=table), k=case.k[moved], v=case.v[moved])
        assert torch.equal(case.answer(TorchSdpa), scattered.answer(TorchSdpa))


def test_keys_are_never_repeated_for_the_query_heads_that_share_them() -> None:
    shape = make_shape(q_heads=8, kv_heads=1, head_dim=64)
    case = make_case(Phase.PREFILL, Workload(((400, 400), (200, 500))), shape)
    bound = TorchSdpa(Phase.PREFILL, case.shape)
    plan = bound.plan(case.batch)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        bound.run(plan, case.q, case.k, case.v)
    assert "aten::clone" not in {event.key for event in profiler.key_averages()}
