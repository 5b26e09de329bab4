"""The answer every backend is held to: dense attention, one sequence at a time, in high precision."""

from __future__ import annotations

import torch
from torch import Tensor

from tessera.attention.contract import Batch, Phase, Shape


def reference_attention(
    phase: Phase,
    shape: Shape,
    batch: Batch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Attend as the contract says (see `AttentionBackend.run`), computed in `dtype` and returned in it.

    Rows of padding sequences, whose kv_len is 0, come back as zeros.
    """
    outputs, first_token = [], 0
    for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
        queries = q[first_token : first_token + q_len].to(dtype)
        if phase is Phase.VISION:
            keys, values = (x[first_token : first_token + q_len].to(dtype) for x in (k, v))
        else:
            pages = batch.page_table[row, : -(-kv_len // k.shape[1])].long()
            keys, values = (pool[pages].flatten(0, 1)[:kv_len].to(dtype) for pool in (k, v))
        first_token += q_len
        outputs.append(attend_densely(shape, queries, keys, values, sinks) if kv_len else torch.zeros_like(queries))
    return torch.cat(outputs)


def attend_densely(shape: Shape, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Attention of one sequence's last tokens to all of its tokens.

    q      [q_len, q_heads, head_dim]
    k, v   [kv_len, kv_heads, head_dim]
    sinks  [q_heads]
    """
    kv_len = len(k)
    k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scale
    if shape.soft_cap is not None:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    scores = scores.masked_fill(~visible_keys(shape, len(q), kv_len).to(q.device), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores)[:, None, None].expand(-1, len(q), 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def visible_keys(shape: Shape, q_len: int, kv_len: int) -> Tensor:
    """[q_len, kv_len] bool: which keys each of a sequence's last `q_len` tokens sees."""
    # How many tokens each query looks back to reach each key; negative: the key is in its future.
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    visible = distance >= 0 if shape.causal else torch.ones_like(distance, dtype=torch.bool)
    if shape.window is not None:
        visible &= distance.abs() < shape.window
    return visible
