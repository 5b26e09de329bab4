"""Whether the fused kernels beside attention (heads into pages, norm, SwiGLU, products of few rows, sampling) serve."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from tessera.log import logger

MIN_CAPABILITY = (8, 0)
"""What Triton supports."""


def fused_on(device: torch.device) -> bool:
    """Whether layers on this device take the fused kernels: on CUDA, where one of them has been seen to run.

    Asked when a layer is made and never after. Everywhere else torch's operators compute the same. On a machine
    without a C compiler Triton imports but cannot launch: a warning says so, once.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    return launch_problem(device) is None


@cache
def launch_problem(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a CUDA device, logged the first time; None where one did."""
    try:
        from tessera.kernels.swiglu import swiglu

        swiglu(torch.zeros(1, 32, dtype=torch.float16, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:  # not installed, no compiler, a driver too old: each raises something else
        problem = _one_line(error)
        logger.warning("torch's operators serve in place of the fused kernels, for Triton fails: %s", problem)
        return problem
    return None


def hopper_gate_up_for(weight: Tensor) -> ModuleType | None:
    """`hopper_gate_up.py` where it multiplies by this weight in small steps: on a Hopper GPU, where it was seen to run.

    Asked when a layer is made.
    """
    device = weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    kernel = _gate_up_module()
    if kernel is None or not kernel.serves_gate_up(1, weight):
        return None
    return kernel if _gate_up_runs(device) else None


@cache
def _gate_up_module() -> ModuleType | None:
    try:
        from tessera.kernels import hopper_gate_up
    except Exception as error:  # Gluon is new, and moves with Triton's versions
        _warn_of_gate_up(error)
        return None
    return hopper_gate_up


@cache
def _gate_up_runs(device: torch.device) -> bool:
    from tessera.kernels.hopper_gate_up import CHUNK, gate_up

    try:
        x = torch.zeros(16, CHUNK, dtype=torch.float16, device=device)
        gate_up(x, x.new_zeros(256, CHUNK))
        torch.cuda.synchronize(device)
    except Exception as error:
        _warn_of_gate_up(error)
        return False
    return True


def _warn_of_gate_up(error: Exception) -> None:
    reason = _one_line(error)
    logger.warning("cuBLAS serves in place of the product with gate and up for Hopper, which fails: %s", reason)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
