"""The compiled CPU decode kernel: right on every workload, and the same bits whatever runs beside a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tessera.attention.backends.numba import Numba
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import DECODES, Workload, make_batch, make_case
from tessera.kernels.paged_decode_cpu import CHUNK, cut_into_chunks, share_among_threads

LENGTHS = (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


def make_shape(dtype: torch.dtype = torch.float32, heads: tuple[int, int, int] = (9, 3, 64)) -> Shape:
    return Shape(*heads, heads[2] ** -0.5, dtype, "cpu", page_size=16)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECODES)
def test_workload_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    case = make_case(Phase.DECODE, DECODES[name], make_shape(dtype))
    assert case.problems(case.answer(Numba)) == []


@pytest.mark.parametrize("heads", [(4, 4, 80), (7, 1, 72), (8, 2, 256)], ids=str)
def test_other_heads_equal_the_oracle(heads: tuple[int, int, int]) -> None:
    case = make_case(Phase.DECODE, DECODES["decode_only"], make_shape(heads=heads))
    assert case.problems(case.answer(Numba)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequence_has_the_same_bits_alone_and_among_others_with_any_number_of_threads(dtype: torch.dtype) -> None:
    case = make_case(Phase.DECODE, Workload(tuple((1, length) for length in LENGTHS)), make_shape(dtype))
    together = case.answer(Numba)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for row, length in enumerate(LENGTHS):
            bound = Numba(Phase.DECODE, case.shape)
            batch = make_batch(((1, length),), case.batch.page_table[row : row + 1])
            alone = bound.run(bound.plan(batch), case.q[row : row + 1], case.k, case.v)
            assert torch.equal(alone[0], together[row]), (num_threads, length)


def test_every_key_lies_in_one_chunk_and_every_chunk_in_one_part() -> None:
    first_keys, kv_lens = [0, 7, 0, 300], [5, 1000, 0, 900]
    chunks, first_chunks = cut_into_chunks(first_keys, kv_lens)
    for seq, (begin, end) in enumerate(zip(first_keys, kv_lens)):
        own = chunks[first_chunks[seq] : first_chunks[seq + 1]]
        assert [key for _, first, last in own for key in range(first, last)] == list(range(begin, end))
        assert (own[:, 0] == seq).all()
        assert ((own[:, 2] - own[:, 1]) <= CHUNK).all()
    for num_threads in (1, 2, 3, 64):
        parts = share_among_threads(chunks, num_threads)
        assert len(parts) == num_threads + 1
        assert parts[0] == 0 and parts[-1] == len(chunks)
        assert (parts[1:] >= parts[:-1]).all()
    halves = share_among_threads(chunks, 2)
    keys = chunks[:, 2] - chunks[:, 1]
    assert abs(int(keys[: halves[1]].sum()) - int(keys[halves[1] :].sum())) <= CHUNK
