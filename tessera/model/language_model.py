"""What every model family offers the runner, the loaders and the memory check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from tessera.model.layers.attention import Attend
from tessera.model.layers.embedding import Head
from tessera.model.layers.linear import Linear
from tessera.model.spec import ModelSpec
from tessera.model.threads import for_each

__all__ = ["Attend", "LanguageModel"]


class LanguageModel(nn.Module, ABC):
    """Token ids and positions to hidden states, and hidden states to logits.

    Holds weights and nothing of a request: keys and values pass through `attend` and are kept elsewhere.
    """

    prefix: ClassVar[str]
    """What a checkpoint may put before the names of all weights but the head's."""
    ignored: ClassVar[str]
    """Pattern of checkpoint tensors that hold no weights: tables that older versions saved."""
    head: Head

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    @abstractmethod
    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states after the final norm.

        token_ids, positions  [tokens] int64, sequences one after another
        returns               [tokens, hidden_size]
        """

    @abstractmethod
    def slots(self) -> dict[str, Tensor]:
        """Checkpoint name -> the parameter, or the view of one, that the tensor fills; before `prepare` only.

        Every name must be filled: these and no others are the model.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] -> [rows, vocab_size] float32"""
        scores: Tensor = self.head(hidden)
        return scores

    @property
    def num_four_bit_layers(self) -> int:
        """Linear layers that have `four_bits`."""
        return sum(isinstance(module, Linear) and module.four_bits is not None for module in self.modules())

    def prepare(self) -> None:
        """Let every linear layer pack its weight; called once, after loading."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        for _ in for_each(lambda linear: linear.prepare(), linears):
            pass


def linear_slots(name: str, linear: Linear) -> dict[str, Tensor]:
    """The slots of a linear layer that a checkpoint holds as one: weight, and bias where there is one."""
    slots: dict[str, Tensor] = {f"{name}.weight": linear.weight}
    if linear.bias is not None:
        slots[f"{name}.bias"] = linear.bias
    return slots


def fused_slots(names: tuple[str, ...], sizes: tuple[int, ...], linear: Linear) -> dict[str, Tensor]:
    """The slots of a linear layer that a checkpoint holds as several: the rows of each, in order."""
    slots: dict[str, Tensor] = {}
    start = 0
    for name, size in zip(names, sizes, strict=True):
        rows = slice(start, start + size)
        slots[f"{name}.weight"] = linear.weight[rows]
        if linear.bias is not None:
            slots[f"{name}.bias"] = linear.bias[rows]
        start += size
    return slots
