"""Small arrays between host and device, without waiting: one copy each way a step.

Memory that a copy reads or writes while the host goes on is pinned, and has an event that says when the copy is done:
how far the host is ahead is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tessera.attention.cuda import make_event

_ALIGNMENT = 256
"""Bytes: at least what kernels may take for granted of a tensor's address."""
TORCH_TYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float64): torch.float64,
}
"""Of the arrays that a step is made of."""

_BUFFERS = 3
"""Of a `Staging`: one that the device reads, one behind it, one that the host writes."""

Array = NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float64]


class Event(Protocol):
    """What tells that everything the device was given up to a point is done."""

    def record(self) -> None:
        """Make it the point that has been reached by now."""

    def synchronize(self) -> None:
        """Wait until the device has reached it; at once where no point was recorded."""


class Staging:
    """Memory on the host through which arrays go to a device, made once: buffers in turn, none written while one copy
    still reads it.

    buffers     [bytes] uint8 each, pinned where the device is a GPU
    make_event  of the device's events; None: CUDA's, on a CPU none, for copies are done at once
    """

    def __init__(self, num_bytes: int, device: torch.device, make_event: Callable[[], Event] | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.buffers = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_BUFFERS)]
        self._events = _events(_BUFFERS, device, make_event)
        self._turn = 0

    def turn(self) -> int:
        """Number of the buffer to be written now; waits until what was in it is copied."""
        self._turn = (self._turn + 1) % _BUFFERS
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        return self._turn

    def send(self, source: Tensor, there: Tensor) -> None:
        """Copy `source`, of the buffer whose turn it is, to the device; the host does not wait.

        source, there  [bytes] uint8
        """
        there.copy_(source, non_blocking=True)
        event = self._events[self._turn]
        if event is not None:
            event.record()


class Returns:
    """Memory on the host for what is sampled, made once: who has read its copy gives it back to be used again.

    rows        most token ids of a step
    make_event  as in `Staging`
    """

    def __init__(self, rows: int, device: torch.device, make_event: Callable[[], Event] | None = None) -> None:
        self._rows, self._device, self._make_event = rows, device, make_event
        self._free: list[tuple[Tensor, Event | None]] = []

    def copy(self, token_ids: Tensor) -> TokenCopy:
        """Begin to copy [at most rows] int64 token ids, behind everything that the device was given before."""
        if self._free:
            memory, event = self._free.pop()
        else:
            memory = torch.empty(self._rows, dtype=torch.int64, pin_memory=self._device.type == "cuda")
            (event,) = _events(1, self._device, self._make_event)
        part = memory[: len(token_ids)]
        part.copy_(token_ids, non_blocking=True)
        if event is not None:
            event.record()
        return TokenCopy(part, event, lambda: self._free.append((memory, event)))


class TokenCopy:
    """Token ids on their way to the host."""

    def __init__(self, token_ids: Tensor, event: Event | None, give_back: Callable[[], None]) -> None:
        """give_back: called when `token_ids` has been read and may be written again."""
        self._token_ids, self._event, self._give_back = token_ids, event, give_back
        self._read: list[int] | None = None

    def wait(self) -> list[int]:
        """The token ids, once they have arrived."""
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            self._read = self._token_ids.tolist()
            self._give_back()
        return self._read


def _events(count: int, device: torch.device, make: Callable[[], Event] | None) -> list[Event | None]:
    if make is None and device.type != "cuda":
        return [None] * count
    return [(make or make_event)() for _ in range(count)]


def aligned(num_bytes: int) -> int:
    """Bytes from the start of an array to where the next may begin."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def to_device(arrays: Items[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors there, in one copy that the host does not wait for; on a CPU their own memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts, size = [], 0
    for array in arrays:
        starts.append(size)
        size += aligned(array.nbytes)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)  # not handed out again before the copy is done
    packed = pinned.numpy()
    for start, array in zip(starts, arrays):
        packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    there = pinned.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(TORCH_TYPES[array.dtype]).view(array.shape)
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
