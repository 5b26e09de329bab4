"""The launcher launches what Triton itself would: whatever the addresses, types and numbers."""

# mypy: disable-error-code="import-untyped, untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from tessera.kernels.launch import Launcher  # noqa: E402
from triton_interpreter import DEVICE, check_in_interpreter, needs_cuda, needs_kernels, outside_interpreter  # noqa: E402


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    values,  # noqa: ANN001
    out,  # noqa: ANN001
    factor,  # noqa: ANN001
    size,  # noqa: ANN001
    shift,  # noqa: ANN001
    BLOCK: tl.constexpr,  # noqa: N803
    TWICE: tl.constexpr,  # noqa: N803
) -> None:
    """out = values * factor + shift, or twice that; what is compiled differs for each kind of argument."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    loaded = tl.load(values + column, mask=column < size, other=0.0).to(tl.float32)
    result = loaded * factor + shift % 1000  # not .to(): a shift of 1 is compiled in, a number of Python's
    tl.store(out + column, (result * 2 if TWICE else result).to(out.dtype.element_ty), mask=column < size)


def expected(values: torch.Tensor, factor: int, shift: int, twice: bool) -> torch.Tensor:
    return ((values.float() * factor + shift % 1000) * (2 if twice else 1)).to(values.dtype)


KINDS = [(1, 1, False), (16, 2**40 + 7, True), (3, 16, False), (3, 7, False), (3, 2**40 + 7, False), (3, 7, True)]
"""Factors, shifts, and whether twice: each differs alone from some other, so that no two may share a kernel."""


def sweep() -> None:
    launch = Launcher(combine_kernel)
    for _ in range(2):  # the second time every variant is there
        for dtype in (torch.float32, torch.float16):
            for offset in (0, 1, 3):  # addresses that are multiples of 16, and not
                for size in (1, 16, 31, 100):
                    for factor, shift, twice in KINDS:
                        memory = torch.arange(200, dtype=dtype, device=DEVICE) / 10
                        values, out = memory[offset : offset + size], torch.zeros(200, dtype=dtype, device=DEVICE)
                        launch((-(-size // 32),), values, out, factor, size, shift, BLOCK=32, TWICE=twice)
                        assert torch.allclose(out[:size], expected(values, factor, shift, twice), rtol=1e-3)
                        assert not out[size:].any()


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
def test_every_kind_of_argument_gets_a_kernel_made_for_it() -> None:
    sweep()


class FakeKernel:
    """Stands for a kernel of two arguments and one constant; notes who bound it and what the driver was given."""

    arg_names = ("values", "size", "BLOCK")

    def __init__(self) -> None:
        self.bound: list[dict[str, Any]] = []
        self.given: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def bind(*_: object, **constants: Any) -> object:
            self.bound.append(constants)
            number = len(self.bound)
            return SimpleNamespace(
                function=f"function {number}", packed_metadata=f"metadata {number}", run=lambda *a: self.given.append(a)
            )

        return bind


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> tuple[Launcher, FakeKernel]:
    """A launcher of a fake kernel, on a driver whose current stream is that of the device's number plus 100."""
    launch, kernel = Launcher(combine_kernel), FakeKernel()
    launch._kernel, launch._interpreted = kernel, False
    active = SimpleNamespace(get_current_stream=lambda device: device + 100)
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=active))
    return launch, kernel


def test_the_driver_is_given_what_triton_would_give_it_and_numbers_for_addresses(
    fake: tuple[Launcher, FakeKernel],
) -> None:
    launch, kernel = fake
    values = torch.zeros(64)
    for _ in range(2):
        launch((3, 2), values, 48, BLOCK=32, num_warps=4)
    assert kernel.bound == [{"BLOCK": 32, "num_warps": 4}]
    launched = (3, 2, 1, 99, "function 1", "metadata 1", None, None, None, values.data_ptr(), 48, 32)
    assert kernel.given == [launched]  # a CPU is device -1


@pytest.mark.parametrize(
    "other",
    [
        {"values": torch.zeros(65)[1:]},
        {"values": torch.zeros(64).half()},
        {"size": 1},
        {"size": 17},
        {"size": 2**33},
        {"size": 0.5},
        {"BLOCK": 64},
    ],
    ids=str,
)
def test_what_is_compiled_anew_is_bound_anew(other: dict[str, Any], fake: tuple[Launcher, FakeKernel]) -> None:
    launch, kernel = fake
    for changed in ({}, other, {}, other):
        given = {"values": torch.zeros(64), "size": 48, "BLOCK": 32} | changed
        launch((1,), given["values"], given["size"], BLOCK=given["BLOCK"])
    assert len(kernel.bound) == 2
    assert [each[4] for each in kernel.given] == ["function 1", "function 2"]


def test_whoever_keeps_a_launch_has_the_one_that_its_launcher_finds(fake: tuple[Launcher, FakeKernel]) -> None:
    launch, kernel = fake
    kept = launch.fixed(BLOCK=32)
    kept((1,), torch.zeros(64), 48)
    launch((1,), torch.zeros(64), 48, BLOCK=32)
    assert len(kernel.bound) == len(kernel.given) == 1


@needs_cuda
def test_a_variant_is_bound_by_triton_once() -> None:
    """Later launches do not go through its binding at all."""
    bound: list[int] = []

    class Counting:
        arg_names = combine_kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            bound.append(1)
            return combine_kernel[grid]

    launch = Launcher(combine_kernel)
    launch._kernel = Counting()
    values = torch.ones(64, device=DEVICE)
    for _ in range(5):
        launch((2,), values, torch.empty_like(values), 2, 64, 3, BLOCK=32, TWICE=False)
    assert len(bound) == 1
