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
    """Queries that are computed together: of one sequence in PREFILL and VISION, of all in DECODE."""

    tokens: slice
    keys: Tensor | slice
    """[seqs, pages]; in VISION the sequence's own tokens."""
    hidden: Tensor
    """[seqs, 1, 1, queries, keys] bool: keys that a query must not see."""


class Naive(AttentionBackend[list[NaivePart]]):
    """Serves every shape, slowly, by the textbook's formula."""

    name: ClassVar[str] = "naive"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS)

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """A matrix product and a softmax, and nobody's fused attention."""
        if shape.device_type == "cpu":
            return Claim(must=("aten::bmm", "aten::_softmax"), must_not=("scaled_dot_product", "flex_attention"))
        return Claim(must=("(?i)softmax",), must_not=("(?i)flash", "(?i)fmha", "(?i)sdpa", "(?i)triton"))

    def plan(self, batch: Batch) -> list[NaivePart]:
        """Divide the queries, and build the mask of each part."""
        if self.phase is Phase.DECODE:
            last = batch.kv_lens.clamp(min=1)[:, None] - 1
            return [self._paged(batch, slice(0, len(batch.q_lens_cpu)), slice(0, len(last)), last)]
        return list(self._parts(batch))

    def run(self, plan: list[NaivePart], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attend part by part, in float32."""
        outputs = [self._attend(part, q[part.tokens], k, v, sinks) for part in plan]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _parts(self, batch: Batch) -> Iterator[NaivePart]:
        first_token = 0
        for row, (q_len, kv_len) in enumerate(zip(batch.q_lens_cpu, batch.kv_lens_cpu)):
            for start in range(0, q_len, MAX_QUERIES):
                num = min(MAX_QUERIES, q_len - start)
                first = kv_len - q_len + start
                positions = torch.arange(first, first + num, device=batch.kv_lens.device)[None]
                tokens = slice(first_token + start, first_token + start + num)
                if self.phase is Phase.VISION:
                    keys = slice(first_token, first_token + q_len)
                    yield NaivePart(tokens, keys, self._hidden(positions, kv_len))
                else:
                    yield self._paged(batch, tokens, slice(row, row + 1), positions)
            first_token += q_len

    def _paged(self, batch: Batch, tokens: slice, rows: slice, positions: Tensor) -> NaivePart:
        """One part, where `positions` [seqs, queries] says where each query stands in its sequence."""
        assert self.shape.page_size is not None
        num_keys = max(batch.kv_lens_cpu[rows], default=1) or 1
        pages = batch.page_table[rows, : -(-num_keys // self.shape.page_size)]
        return NaivePart(tokens, pages.long(), self._hidden(positions, num_keys))

    def _hidden(self, positions: Tensor, num_keys: int) -> Tensor:
        distance = positions[:, :, None] - torch.arange(num_keys, device=positions.device)
        hidden = distance < 0 if self.shape.causal else torch.zeros_like(distance, dtype=torch.bool)
        if self.shape.window is not None:
            hidden |= distance.abs() >= self.shape.window
        return hidden[:, None, None]

    def _attend(self, part: NaivePart, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        num_seqs, num_queries, num_keys = part.hidden.shape[0], part.hidden.shape[3], part.hidden.shape[4]
        if isinstance(part.keys, slice):
            keys, values = (x[part.keys][None].float() for x in (k, v))
        else:
            keys, values = (x[part.keys].flatten(1, 2)[:, :num_keys].float() for x in (k, v))
        grouped = q.float().reshape(num_seqs, num_queries, self.shape.num_kv_heads, -1, q.shape[2])
        scores = torch.einsum("sqhgd,skhd->shgqk", grouped, keys) * self.shape.scale
        if self.shape.soft_cap is not None:
            scores = torch.tanh(scores / self.shape.soft_cap) * self.shape.soft_cap
        weights = self._softmax(scores.masked_fill(part.hidden, -torch.inf), sinks)
        return torch.einsum("shgqk,skhd->sqhgd", weights, values).reshape(q.shape).to(q.dtype)

    def _softmax(self, scores: Tensor, sinks: Tensor | None) -> Tensor:
        """Over the keys; a sink is one key more, whose weight is left out."""
        if sinks is None:
            return scores.softmax(-1)
        column = sinks.view(1, self.shape.num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1]
