"""naive: gather, matmul, softmax, matmul. The plainest attention there is, for comparison.

It holds every score at once, in float32, for 256 queries of a sequence at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape

MAX_QUERIES = 256

_LIMITS = Limits(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cpu", "cuda"),
    windows=True,
    soft_caps=True,
    sinks=True,
    bidirectional=True,
)


@dataclass(frozen=True)
class NaivePart:
    """Queries that are computed together: of one sequence in PREFILL, of all in DECODE."""

    tokens: slice
    pages: Tensor
    """[seqs, pages]"""
    hidden: Tensor
    """[seqs, 1, 1, queries, keys] bool: keys that a query must not see."""


class Naive(AttentionBackend[list[NaivePart]]):
    """Serves every shape, slowly, by the textbook's formula."""

    name: ClassVar[str] = "naive"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS)

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """A matrix product and a softmax of their own, and nobody's fused attention."""
        if shape.device_type == "cpu":
            return Claim(must=("aten::bmm", "aten::_softmax"), must_not=("scaled_dot_product",))
        return Claim(must=("softmax",), must_not=("flash", "fmha", "sdpa", "triton"))

    def plan(self, batch: Batch) -> list[NaivePart]:
        """Divide the queries, and build the mask of each part."""
        if self.phase is Phase.DECODE:
            last = batch.kv_lens.clamp(min=1)[:, None] - 1
            return [self._part(batch, slice(0, len(batch.q_lens_cpu)), slice(0, len(last)), last)]
        return list(self._prefill_parts(batch))

    def run(self, plan: list[NaivePart], q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """Attend part by part, in float32."""
        outputs = [self._attend(part, q[part.tokens], k_pages, v_pages) for part in plan]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _prefill_parts(self, batch: Batch) -> Iterator[NaivePart]:
        first_token = 0
        for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
            for start in range(0, q_len, MAX_QUERIES):
                num = min(MAX_QUERIES, q_len - start)
                first = kv_len - q_len + start
                positions = torch.arange(first, first + num, device=batch.page_table.device)[None]
                tokens = slice(first_token + start, first_token + start + num)
                yield self._part(batch, tokens, slice(row, row + 1), positions)
            first_token += q_len

    def _part(self, batch: Batch, tokens: slice, rows: slice, positions: Tensor) -> NaivePart:
        """One part, where `positions` [seqs, queries] says where each query stands in its sequence."""
        page_size = self.shape.page_size
        assert page_size is not None
        num_keys = max(batch.kv_lens_cpu[rows], default=1) or 1
        pages = batch.page_table[rows, : -(-num_keys // page_size)]
        distance = positions[:, :, None] - torch.arange(num_keys, device=positions.device)
        hidden = distance < 0
        if self.shape.window is not None:
            hidden |= distance >= self.shape.window
        return NaivePart(tokens, pages.long(), hidden[:, None, None])

    def _attend(self, part: NaivePart, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        num_seqs, num_queries, num_keys = part.hidden.shape[0], part.hidden.shape[3], part.hidden.shape[4]
        k, v = (x[part.pages].flatten(1, 2)[:, :num_keys].float() for x in (k_pages, v_pages))
        grouped = q.float().reshape(num_seqs, num_queries, k.shape[2], -1, q.shape[2])
        scores = torch.einsum("sqhgd,skhd->shgqk", grouped, k) * self.shape.scale
        weights = scores.masked_fill(part.hidden, -torch.inf).softmax(-1)
        return torch.einsum("shgqk,skhd->sqhgd", weights, v).reshape(q.shape).to(q.dtype)
