"""What attention kernels of every kind are told about scores."""

from __future__ import annotations

from typing import NamedTuple

LOG2_E = 1.4426950408889634


class Scores(NamedTuple):
    """What becomes of q·k before the softmax."""

    scale: float
    """Multiplies it."""
    window: int | None
    """A token sees itself and `window - 1` tokens before it, and where it sees those after it, as many; None: all."""
    soft_cap: float | None
    """Scores become `soft_cap * tanh(score / soft_cap)`; None: they stay as they are."""

    @property
    def log2(self) -> tuple[float, float]:
        """The scale and the soft cap as kernels take them, in units of log2; a cap of 0 is none."""
        return self.scale * LOG2_E, (self.soft_cap or 0.0) * LOG2_E
