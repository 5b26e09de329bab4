"""Small arrays between host and device, without waiting: one copy each way a step."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.cuda import make_event

_ALIGNMENT = 256
"""Bytes: at least what kernels may take for granted of a tensor's address."""
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
}

Array = NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float64]


def to_device(arrays: Items[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors there, in one copy that the host does not wait for; on a CPU their own memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)  # not handed out again before the copy is done
    packed = pinned.numpy()
    for start, array in zip(starts, arrays):
        packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    there = pinned.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for start, array in zip(starts, arrays)
    ]


class HostCopy:
    """Tensors on their way to the host, behind everything that the device was given before."""

    def __init__(self, tensors: Items[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for pinned, tensor in zip(self._tensors, tensors):
                pinned.copy_(tensor, non_blocking=True)
            self._event = make_event()
            self._event.record()

    def wait(self) -> list[Tensor]:
        """The tensors, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors
