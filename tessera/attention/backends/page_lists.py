"""Page tables as lists: the pages of all sequences one behind the other, as libraries without page tables want them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tessera.attention.contract import Batch


@dataclass(frozen=True)
class PageLists:
    """The pages that each sequence of a batch holds; a padding row counts as one token in its first page."""

    starts_cpu: Tensor
    """[seqs + 1] int32: where each sequence's pages begin in `pages`, from 0."""
    starts: Tensor
    """The same, on the device of the page table."""
    pages: Tensor
    """[pages of all sequences] int32"""
    last_page_lens_cpu: Tensor
    """[seqs] int32: tokens in each sequence's last page, 1 to page_size."""


def list_pages(batch: Batch, page_size: int) -> PageLists:
    """The page lists of `batch`, made without waiting for the device.

    A padding row keeps one token because a softmax over nothing is not finite; what it reads is
    entry 0 of its page table.
    """
    lens = [max(1, kv_len) for kv_len in batch.kv_lens_cpu]
    starts = [0, *accumulate(-(-length // page_size) for length in lens)]
    starts_cpu = torch.tensor(starts, dtype=torch.int32)
    device = batch.page_table.device
    on_device = starts_cpu.to(device, non_blocking=True)
    # The host knows how many there are: without `output_size` the device would be asked.
    seqs = torch.arange(len(lens), device=device)
    rows = torch.repeat_interleave(seqs, on_device.diff(), output_size=starts[-1])
    columns = torch.arange(starts[-1], device=device) - on_device[rows]
    last_page_lens = [(length - 1) % page_size + 1 for length in lens]
    return PageLists(
        starts_cpu=starts_cpu,
        starts=on_device,
        pages=batch.page_table[rows, columns],
        last_page_lens_cpu=torch.tensor(last_page_lens, dtype=torch.int32),
    )


def starts_of(lens: list[int]) -> Tensor:
    """[len(lens) + 1] int32 on the host: prefix sums of `lens`, from 0."""
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
