"""Copies between host and device: memory is not written again while somebody still reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.runner.transfer import Returns, Staging

CPU = torch.device("cpu")


class Device:
    """A device that copies nothing before somebody waits for it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.done = 0

    def work_up_to(self, point: int) -> None:
        """Do what is queued before."""
        for copy in self.queue[self.done : point]:
            copy()
        self.done = max(self.done, point)

    def event(self) -> Reached:
        """One of its events."""
        return Reached(self)


class Reached:
    """An event of that device."""

    def __init__(self, device: Device) -> None:
        self._device, self._point = device, 0

    def record(self) -> None:
        """After what is queued now."""
        self._point = len(self._device.queue)

    def synchronize(self) -> None:
        """Let the device work."""
        self._device.work_up_to(self._point)


class Late:
    """Memory on that device: what is copied to it arrives late."""

    def __init__(self, device: Device, tensor: Tensor) -> None:
        self.device, self.tensor = device, tensor

    def copy_(self, source: Tensor, *, non_blocking: bool) -> None:
        """Read the source when somebody waits."""
        assert non_blocking
        self.device.queue.append(lambda: self.tensor.copy_(source))


def test_a_buffer_is_not_written_again_before_its_copy_is_done() -> None:
    """Ten steps ahead of a device that does nothing by itself: each finds what was written for it."""
    device = Device()
    staging = Staging(4, CPU, device.event)
    arrived = [torch.zeros(4, dtype=torch.uint8) for _ in range(10)]
    for number, there in enumerate(arrived):
        buffer = staging.buffers[staging.turn()]
        buffer.fill_(number + 1)
        staging.send(buffer, Late(device, there))  # type: ignore[arg-type]
    device.work_up_to(10)
    assert [there.tolist() for there in arrived] == [[number + 1] * 4 for number in range(10)]


def test_as_many_copies_are_under_way_as_there_are_buffers_before_the_host_waits() -> None:
    device = Device()
    staging = Staging(4, CPU, device.event)
    done = []
    for _ in range(5):
        staging.send(staging.buffers[staging.turn()], Late(device, torch.zeros(4)))  # type: ignore[arg-type]
        done.append(device.done)
    assert done == [0, 0, 0, 1, 2]


def test_what_comes_back_stays_until_it_is_read_and_its_memory_serves_again() -> None:
    returns, sampled = Returns(4, CPU), torch.tensor([1, 2, 3, 4])
    first = returns.copy(sampled)
    sampled += 10  # the next step samples into the same memory
    second = returns.copy(sampled[:2])
    assert first._token_ids.data_ptr() != second._token_ids.data_ptr()
    assert (first.wait(), second.wait()) == ([1, 2, 3, 4], [11, 12])
    third = returns.copy(sampled)
    assert third._token_ids.data_ptr() in (first._token_ids.data_ptr(), second._token_ids.data_ptr())
    assert first.wait() == [1, 2, 3, 4] and third.wait() == [11, 12, 13, 14]


def test_what_comes_back_is_waited_for() -> None:
    waited: list[str] = []

    class Told:
        """An event that keeps a record of its calls."""

        def record(self) -> None:
            """Keep it."""
            waited.append("recorded")

        def synchronize(self) -> None:
            """Keep it."""
            waited.append("waited")

    copy = Returns(4, CPU, Told).copy(torch.tensor([5]))
    assert waited == ["recorded"]
    assert copy.wait() == copy.wait() == [5] and waited == ["recorded", "waited"]
