"""The answer every backend is held to: dense attention, one sequence at a time, in high precision."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.attention.contract import Batch, Shape


def reference_attention(
    shape: Shape, batch: Batch, q: Tensor, k_pages: Tensor, v_pages: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Attend as the contract says, computed in `dtype` and returned in it.

    q                 [tokens, q_heads, head_dim]
    k_pages, v_pages  [pages, page_size, kv_heads, head_dim]
    returns           [tokens, q_heads, head_dim]
    """
    outputs = []
    table = batch.page_table.long()
    for row, part in enumerate(torch.split(q, batch.q_lens_cpu)):
        kv_len = batch.kv_lens_cpu[row]
        num_pages = -(-kv_len // k_pages.shape[1])
        k, v = (pages[table[row, :num_pages]].flatten(0, 1)[:kv_len].to(dtype) for pages in (k_pages, v_pages))
        outputs.append(attend_densely(part.to(dtype), k, v, shape.scale, shape.window))
    return torch.cat(outputs)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of one sequence's last tokens to all of its tokens.

    q     [q_len, q_heads, head_dim]
    k, v  [kv_len, kv_heads, head_dim]
    """
    q_len, kv_len, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    # How many tokens each query looks back to reach each key; negative: the key is in its future.
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    visible = (distance >= 0) & (distance < (kv_len if window is None else window))
    scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
