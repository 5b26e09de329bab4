"""The two ends of a model: token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera.model.layers.linear import Linear, packs
from tessera.model.layers.parameter import Placement


class Embedding(nn.Module):
    """One learned vector an id."""

    weight: nn.Parameter
    """[num_ids, hidden_size]"""

    def __init__(self, num_ids: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.weight = placement.empty(num_ids, hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """[tokens] int64 -> [tokens, hidden_size]"""
        return functional.embedding(ids, self.weight)


LEADING = 16
"""Logits of a row that are computed once more where the product is rounded to a half type."""


class Head(Linear):
    """Vectors to logits, by the embedding's own weight where the two are tied.

    A weight that `prepare` packs is held twice: packed for the logits, unpacked for the lookup and, in half
    types, for the leading logits.
    """

    def __init__(self, embedding: Embedding, *, tied: bool, placement: Placement) -> None:
        num_ids, hidden_size = embedding.weight.shape
        nothing = Placement(placement.dtype, embedding.weight.device)
        super().__init__(hidden_size, 0 if tied else num_ids, bias=False, placement=nothing)
        if tied:
            self.weight = embedding.weight
        self.unpacked: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, num_ids] float32

        Rounded to bfloat16, logits near 20 would lie 0.125 apart, and tokens of different probability would tie. On
        CUDA the product is not rounded. A CPU's product always is: there the leading logits are computed again.
        """
        if hidden.dtype == torch.float32:
            return super().forward(hidden)
        if hidden.device.type == "cuda":
            return torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        logits = super().forward(hidden).float()
        leading = logits.topk(min(LEADING, logits.shape[-1]), sorted=False).indices
        weight = self.weight if self.unpacked is None else self.unpacked
        exact = torch.bmm(weight[leading].float(), hidden.float()[:, :, None])
        return logits.scatter_(1, leading, exact.squeeze(-1))

    def prepare(self) -> None:
        """See Linear.prepare; in half types the unpacked weight is kept as well."""
        if self.packed is None and self.weight.dtype != torch.float32 and packs(self.weight.dtype, self.weight.device):
            self.unpacked = self.weight.detach()
        super().prepare()
