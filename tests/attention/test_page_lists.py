"""Page lists: the pages of each sequence in order, padding rows included."""

from __future__ import annotations

import pytest
import torch

from attention_cases import PAGED, make_shape
from tessera.attention.backends.page_lists import list_pages
from tessera.attention.contract import Phase
from tessera.attention.workloads import WORKLOADS, make_batch, make_case


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("phase", PAGED)
def test_page_lists_name_the_pages_of_each_sequence_in_order(phase: Phase, page_size: int) -> None:
    for workload in WORKLOADS[phase].values():
        batch = make_case(phase, workload, make_shape(page_size=page_size)).batch
        lists = list_pages(batch, page_size)
        starts = lists.starts.tolist()
        assert starts == lists.starts_cpu.tolist()
        for row, kv_len in enumerate(batch.kv_lens_cpu):
            held = -(-max(1, kv_len) // page_size)
            assert lists.pages[starts[row] : starts[row + 1]].tolist() == batch.page_table[row, :held].tolist()
            assert (held - 1) * page_size + int(lists.last_page_lens_cpu[row]) == max(1, kv_len)
        assert starts[-1] == len(lists.pages)
        assert {lists.pages.dtype, lists.starts.dtype, lists.last_page_lens_cpu.dtype} == {torch.int32}


def test_a_padding_row_counts_as_one_token_of_its_first_page() -> None:
    table = torch.tensor([[7, 3, 9, 0], [0, 0, 0, 0], [4, 8, 0, 0]], dtype=torch.int32)[:, :3]
    lists = list_pages(make_batch(((1, 35), (1, 0), (1, 32)), table, 10), 16)
    assert lists.starts.tolist() == [0, 3, 4, 6]
    assert lists.pages.tolist() == [7, 3, 9, 0, 4, 8]
    assert lists.last_page_lens_cpu.tolist() == [3, 1, 16]
