"""Dense float32 attention and random paged inputs: what every kernel is checked against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedInputs:
    """Queries of a batch and the pages that its keys and values lie in."""

    q: Tensor
    """[tokens, q_heads, head_dim]"""
    k_pages: Tensor
    """[pages, page_size, kv_heads, head_dim]"""
    v_pages: Tensor
    page_table: Tensor
    """[seqs, max_pages] int32"""
    cu_q_lens: Tensor
    """[seqs + 1] int32"""
    kv_lens: Tensor
    """[seqs] int32"""


def prefix_sums(lens: list[int], device: torch.device | str) -> Tensor:
    """[len(lens) + 1] int32, from 0."""
    return torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)


def paged_inputs(
    q_lens: list[int], kv_lens: list[int], heads: tuple[int, int], head_dim: int, page_size: int,
    dtype: torch.dtype, device: torch.device | str, num_pages: int | None = None,
) -> PagedInputs:  # fmt: skip
    """Random queries and shuffled pages; slots that no sequence owns hold large numbers, to show wrong reads."""
    counts = [-(-n // page_size) for n in kv_lens]
    total = max(num_pages or 0, sum(counts) + 3)
    order = torch.randperm(total, device=device).to(torch.int32)
    table = torch.zeros(len(kv_lens), max(1, *counts), dtype=torch.int32, device=device)
    at = 0
    for i, n in enumerate(counts):
        table[i, :n] = order[at : at + n]
        at += n
    k, v = (torch.randn(total, page_size, heads[1], head_dim, device=device).to(dtype) for _ in range(2))
    if num_pages is None:
        k[order[at:].long()], v[order[at:].long()] = 500.0, 500.0
    q = torch.randn(sum(q_lens), heads[0], head_dim, device=device).to(dtype)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    return PagedInputs(q, k, v, table, prefix_sums(q_lens, device), lens)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention in float32; queries are the last tokens. q [q_len, q_heads, dim], k and v [kv_len, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(k.shape[1] - q.shape[0] + 1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1)


def dense_paged(x: PagedInputs, scale: float) -> Tensor:
    """Causal attention over pages in float32, zeros for an empty sequence. [tokens, q_heads, head_dim]"""
    outs = []
    page_size = x.k_pages.shape[1]
    bounds = x.cu_q_lens.tolist()
    for i, kv_len in enumerate(x.kv_lens.tolist()):
        q = x.q[bounds[i] : bounds[i + 1]]
        if kv_len == 0:
            outs.append(torch.zeros_like(q, dtype=torch.float32))
            continue
        pages = x.page_table[i, : -(-kv_len // page_size)].long()
        k, v = (p[pages].flatten(0, 1)[:kv_len] for p in (x.k_pages, x.v_pages))
        outs.append(dense(q, k, v, scale, causal=True))
    return torch.cat(outs)


def relative_error(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest absolute error, norm of the error over the norm of the expected); inf where out has a NaN."""
    if not bool(out.isfinite().all()):
        return float("inf"), float("inf")
    diff = out.float() - expected
    return float(diff.abs().max()), float(diff.norm() / expected.norm())
