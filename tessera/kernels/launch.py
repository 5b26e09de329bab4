"""Launching a Triton kernel in a fraction of the host's time.

Triton binds every argument, option and setting anew at each launch, which takes the host some 40 us for a kernel of
twenty arguments: in a model's eager step that is longer than the kernels themselves run. What it compiles for is
little of that: types, whether addresses and numbers are multiples of 16, and what is compiled in.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from typing import Any

import triton
from torch import Tensor


class Launcher:
    """A kernel with the variants of it that were compiled, found by a key that tells apart all that Triton does.

    kernel  a @triton.jit or @gluon.jit function whose compile-time parameters come last; in Triton's interpreter it is
            called as it is
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._interpreted = not isinstance(kernel, triton.JITFunction)
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launch on the current stream: `kernel[grid](*arguments, **constants)`, where `constants` are the
        compile-time parameters and the compiler's options, in the same order at each call.
        """
        if self._interpreted:
            self._kernel[grid](*arguments, **constants)
            return
        key = (arguments[0].device.index, *map(_kind, arguments), *constants.values())
        found = self._compiled.get(key)
        if found is None:
            compiled = self._kernel[grid](*arguments, **constants)
            names = self._kernel.arg_names[len(arguments) :]
            self._compiled[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, compiled_in = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *compiled_in)


def _kind(argument: Any) -> Any:
    """What a kernel is compiled for of an argument."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, float):
        return float
    # A descriptor of a tensor for the copy engine.
    return argument.base.dtype, tuple(argument.block_shape), argument.layout
