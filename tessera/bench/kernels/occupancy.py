"""How many warps of a kernel a multiprocessor can hold, from what a block takes (CUDA's occupancy calculator)."""

from __future__ import annotations

from dataclasses import dataclass

_MAX_BLOCKS = {(7, 5): 16, (8, 6): 16, (8, 7): 16, (8, 9): 24, (12, 0): 24, (12, 1): 24}
"""By compute capability; 32 elsewhere, see the CUDA programming guide, technical specifications."""
_SHARED_STEP, _REGISTER_STEP, _WARP_STEP = 128, 256, 4
_RESERVED = 1024
"""Bytes of shared memory that the system takes of each block, from compute capability 8.0 on."""


@dataclass(frozen=True)
class Multiprocessor:
    """What blocks share."""

    capability: tuple[int, int]
    registers: int
    shared_bytes: int
    warps: int

    @property
    def blocks(self) -> int:
        """Most at a time."""
        return _MAX_BLOCKS.get(self.capability, 32)


def occupancy(unit: Multiprocessor, *, registers: int, shared_bytes: int, warps: int) -> float:
    """The share of a multiprocessor's warps that blocks fill at most; 0 where not even one block fits.

    registers     of a thread
    shared_bytes  of a block, static and dynamic
    warps         of a block
    """
    by_warp = _up(registers * 32, _REGISTER_STEP)
    warps_by_registers = unit.registers // by_warp // _WARP_STEP * _WARP_STEP if by_warp else unit.warps
    reserved = _RESERVED if unit.capability >= (8, 0) else 0
    shared = _up(shared_bytes + reserved, _SHARED_STEP)
    limits = [unit.blocks, unit.warps // warps, warps_by_registers // warps]
    limits += [unit.shared_bytes // shared] if shared else []
    return min(limits) * warps / unit.warps


def multiprocessor() -> Multiprocessor:
    """That of the current CUDA device."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Multiprocessor(
        (found.major, found.minor),
        getattr(found, "regs_per_multiprocessor", 65536),  # of every GPU since 2014; torch tells it of late only
        found.shared_memory_per_multiprocessor,
        found.max_threads_per_multi_processor // 32,
    )


def _up(value: int, step: int) -> int:
    return -(-value // step) * step
