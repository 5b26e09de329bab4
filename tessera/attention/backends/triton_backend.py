"""What backends of our own Triton kernels share: what they need, and the interpreter that runs them on a CPU."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tessera.attention.backends.triton_options import INTERPRETED
from tessera.attention.contract import AttentionBackend, Claim, Phase, Shape

Plan = TypeVar("Plan")


def claim_of(kernel: str, shape: Shape) -> Claim:
    """One kernel, and nobody else's attention; on a CPU the range that is marked in the interpreter."""
    if shape.device_type == "cpu":
        return Claim(must=(f"^triton_interpreted::{kernel}$",))
    return Claim(must=(f"^{kernel}",), must_not=("(?i)pytorch_flash|cudnn|fmha|flash_fwd",))


class TritonBackend(AttentionBackend[Plan]):
    """A backend that launches one kernel of ours a layer."""

    needs: ClassVar[tuple[str, ...]] = ("triton",)
    packages: ClassVar[tuple[str, ...]] = ("triton", "torch")
    install: ClassVar[str | None] = "pip install triton"

    @classmethod
    @abstractmethod
    def kernel_of(cls, phase: Phase) -> str:
        """The kernel of a phase, as a profiler sees it."""

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The kernel of the phase."""
        return claim_of(cls.kernel_of(phase), shape)

    def run(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One kernel; it reads lengths and pages from the tensors of the planned batch."""
        if not INTERPRETED or self.shape.device_type != "cpu":
            return self._launch(plan, q, k, v, sinks)
        with torch.profiler.record_function(f"triton_interpreted::{self.kernel_of(self.phase)}"):
            return self._launch(plan, q, k, v, sinks)

    @abstractmethod
    def _launch(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """As `run`."""
