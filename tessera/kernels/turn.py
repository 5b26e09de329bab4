"""What becomes of queries and keys between their projection and the pages."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Turn(NamedTuple):
    """Each head's normalisation, then its rotation; either may be absent."""

    q_weight: Tensor | None = None
    """[head_dim]: every query head is scaled to a root mean square of 1, then by this; None: queries stay."""
    k_weight: Tensor | None = None
    """The same of keys; there if and only if `q_weight` is."""
    eps: float = 0.0
    """Added to the mean square."""
    rotation: tuple[Tensor, Tensor] | None = None
    """Of each token the cosines, [tokens, 1, head_dim], and sines, [tokens, 1, head_dim / 2]; in the heads' dtype."""
