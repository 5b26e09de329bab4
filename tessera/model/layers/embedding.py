"""The two ends of a model: token ids to vectors, and vectors to logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tessera.model.layers.linear import Linear
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


class Head(Linear):
    """Vectors to logits, by the embedding's own weight where the two are tied.

    A tied weight that `prepare` packs is held twice: packed for the logits, unpacked for the lookup.
    """

    def __init__(self, embedding: Embedding, *, tied: bool, placement: Placement) -> None:
        num_ids, hidden_size = embedding.weight.shape
        nothing = Placement(placement.dtype, embedding.weight.device)
        super().__init__(hidden_size, 0 if tied else num_ids, bias=False, placement=nothing)
        if tied:
            self.weight = embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, num_ids] float32

        On CUDA a product of half types is not rounded back to them: in bfloat16 logits near 20 would lie 0.125
        apart, and tokens of different probability would tie.
        """
        if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
            return torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        return super().forward(hidden).float()
