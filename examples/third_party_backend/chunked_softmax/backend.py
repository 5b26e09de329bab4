"""chunked_softmax: keys in chunks, and a softmax that is corrected as they come (arXiv 1805.02867).

The scores of one chunk are all that is ever held, which is the idea behind flash attention; here it is in plain
torch, to be read and not to be fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape

CHUNK_TOKENS = 128
HIDDEN = -1e30
"""Score of a key that a query must not see. Not -inf: where a chunk holds no visible key, inf - inf would be NaN."""


@dataclass(frozen=True)
class Chunk:
    """Some of a sequence's keys."""

    where: Tensor | slice
    """[pages] of the pools; in VISION the rows of the packed keys."""
    positions: Tensor
    """[keys]: where each key stands in its sequence."""


@dataclass(frozen=True)
class Part:
    """One sequence of a step."""

    tokens: slice
    positions: Tensor
    """[queries]: where each query stands in its sequence."""
    chunks: list[Chunk]


class ChunkedSoftmax(AttentionBackend[list[Part]]):
    """One sequence after another, one chunk of keys after another."""

    name: ClassVar[str] = "chunked_softmax"
    packages: ClassVar[tuple[str, ...]] = ("torch", "tessera-example-attention")
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(
        Phase,
        Limits(
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            devices=("cpu", "cuda"),
            windows=True,
            soft_caps=True,
            bidirectional=True,
        ),
    )

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """Matrix products and exponentials of our own, and nobody's softmax or fused attention."""
        if shape.device_type == "cpu":
            return Claim(must=("aten::bmm", "aten::exp$"), must_not=("_softmax", "scaled_dot_product"))
        return Claim(must=("(?i)gemm|gemv|cutlass", "(?i)exp"), must_not=("(?i)softmax", "(?i)flash", "(?i)fmha"))

    def plan(self, batch: Batch) -> list[Part]:
        """Divide every sequence's keys into chunks; padding rows, which have none, are left out."""
        parts, first_token = [], 0
        device = batch.kv_lens.device
        for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
            tokens = slice(first_token, first_token := first_token + q_len)
            if kv_len:
                positions = torch.arange(kv_len - q_len, kv_len, device=device)
                parts.append(Part(tokens, positions, list(self._chunks(batch, row, tokens, kv_len))))
        return parts

    def run(self, plan: list[Part], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attend; rows of padding stay zeros."""
        assert sinks is None, "the limits do not claim sinks, so none are given"
        out = q.new_zeros(q.shape)
        for part in plan:
            out[part.tokens] = self._attend(part, q[part.tokens], k, v).to(q.dtype)
        return out

    def _chunks(self, batch: Batch, row: int, tokens: slice, kv_len: int) -> Iterator[Chunk]:
        page_size = self.shape.page_size or 1
        step = max(1, CHUNK_TOKENS // page_size) * page_size
        oldest_query = kv_len - batch.q_lens_cpu[row]
        oldest = 0 if self.shape.window is None else max(0, oldest_query - self.shape.window + 1)
        for start in range(oldest // step * step, kv_len, step):
            end = min(start + step, kv_len)
            where: Tensor | slice = slice(tokens.start + start, tokens.start + end)
            if self.phase is not Phase.VISION:
                where = batch.page_table[row, start // page_size : -(-end // page_size)].long()
            yield Chunk(where, torch.arange(start, end, device=batch.kv_lens.device))

    def _attend(self, part: Part, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence's queries [queries, q_heads, head_dim], in float32."""
        kv_heads, group = self.shape.num_kv_heads, self.shape.group
        # A row is a query of one of the heads that share a key head.
        rows = (q.float() * self.shape.scale).view(len(q), kv_heads, group, -1).permute(1, 2, 0, 3).flatten(1, 2)
        best = rows.new_full((kv_heads, rows.shape[1], 1), HIDDEN)
        total, gathered = torch.zeros_like(best), torch.zeros_like(rows)
        for chunk in part.chunks:
            keys, values = (self._read(x, chunk) for x in (k, v))
            scores = self._scores(rows, keys, part.positions, chunk.positions)
            new_best = torch.maximum(best, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - new_best).exp(), (best - new_best).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            gathered = gathered * shrink + torch.bmm(weights, values)
            best = new_best
        return (gathered / total).view(kv_heads, group, len(q), -1).permute(2, 0, 1, 3).reshape(q.shape)

    def _read(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's keys or values, [kv_heads, keys, head_dim]; what lies behind the last token is cut off."""
        taken = x[chunk.where] if isinstance(chunk.where, slice) else x[chunk.where].flatten(0, 1)
        return taken[: len(chunk.positions)].transpose(0, 1).float()

    def _scores(self, rows: Tensor, keys: Tensor, queries_at: Tensor, keys_at: Tensor) -> Tensor:
        """[kv_heads, rows, keys]"""
        scores = torch.bmm(rows, keys.transpose(1, 2))
        if self.shape.soft_cap is not None:
            scores = torch.tanh(scores / self.shape.soft_cap) * self.shape.soft_cap
        distance = queries_at[:, None] - keys_at
        hidden = distance < 0 if self.shape.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.shape.window is not None:
            hidden |= distance.abs() >= self.shape.window
        return scores.masked_fill(hidden.repeat(self.shape.group, 1), HIDDEN)
