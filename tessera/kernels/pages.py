"""Pages of keys and values: tokens go in by slot, and come out by page.

A slot is a token's place in a pool: `page * page_size + offset`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, *, padded: bool = False) -> None:
    """Put each token's key and value into its slot, and touch no other byte.

    k, v              [tokens, kv_heads, head_dim]
    k_pages, v_pages  [pages, page_size, kv_heads, head_dim], written in place
    slots             [tokens] int64, none twice; where `padded`, a negative one is padding and is skipped

    The caller vouches for `padded`: only it knows without asking the device. A negative slot that was
    not announced raises IndexError on a CPU.
    """
    if padded:
        _write_real_tokens(k, v, k_pages, v_pages, slots)
        return
    k_pages.flatten(0, 1).index_copy_(0, slots, k)
    v_pages.flatten(0, 1).index_copy_(0, slots, v)


def gather_pages(pages: Tensor, page_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy whole pages, one behind the other.

    pages     [pages, page_size, kv_heads, head_dim]
    page_ids  [n], repeats allowed
    out       [n, page_size, kv_heads, head_dim], taken in place of new memory
    returns   [n * page_size, kv_heads, head_dim]
    """
    gathered = (
        torch.index_select(pages, 0, page_ids) if out is None else torch.index_select(pages, 0, page_ids, out=out)
    )
    return gathered.flatten(0, 1)


def _write_real_tokens(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    # Padding repeats the write of the first real token, or, where all is padding, writes back what slot 0
    # holds: no shape depends on the data, so a device need not be asked and a CUDA graph can record this.
    real = slots >= 0
    first = real.int().argmax(0, keepdim=True)
    tokens = torch.where(real, torch.arange(len(slots), device=slots.device), first)
    targets = slots[tokens].clamp_(min=0)
    any_real = real.any()
    for values, pool in ((k, k_pages.flatten(0, 1)), (v, v_pages.flatten(0, 1))):
        pool.index_copy_(0, targets, torch.where(any_real, values[tokens], pool[targets]))
