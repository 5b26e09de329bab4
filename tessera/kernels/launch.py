"""Launching a Triton kernel in a fraction of the host's time.

Triton binds every argument, option and setting anew at each launch, and calls its hooks, which takes the host some
40 us for a kernel of twenty arguments: in a model's eager step that is longer than the kernels themselves run. What it
compiles for is little of that: types, whether addresses and numbers are multiples of 16, and what is compiled in.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

Grid = tuple[int] | tuple[int, int] | tuple[int, int, int]
_REST = ((), (1, 1), (1,), ())
"""What a grid of so many dimensions lacks of three."""


class Launcher:
    """A kernel with all variants of it that were compiled.

    kernel  a @triton.jit or @gluon.jit function whose compile-time parameters come last; in Triton's interpreter it is
            called as it is
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._interpreted = not isinstance(kernel, triton.JITFunction)
        self._fixed: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        """Launch on the current stream: `kernel[grid](*arguments, **constants)`, where `constants` are the
        compile-time parameters and the compiler's options, in the same order at each call.
        """
        self.fixed(**constants)(grid, *arguments)

    def fixed(self, **constants: Any) -> Launch:
        """The kernel with what is compiled in, `constants` as of `__call__`; callers that keep it save host time."""
        key = tuple(constants.values())
        found = self._fixed.get(key)
        if found is None:
            found = self._fixed[key] = Launch(self._kernel, constants, interpreted=self._interpreted)
        return found


class _Variant(NamedTuple):
    """What a launch of a compiled kernel takes beside its grid, its stream and its arguments."""

    run: Any
    stream_of: Any
    """Device number -> the stream that is current there."""
    function: Any
    metadata: Any
    compiled_in: tuple[Any, ...]
    """The compile-time parameters, which Triton wants to see and does not read."""
    owner: Any
    """Unloads the function when it is gone."""


class Launch:
    """A kernel with its constants; each kind of arguments is compiled, and bound, once. Made by `Launcher.fixed`."""

    def __init__(self, kernel: Any, constants: dict[str, Any], *, interpreted: bool) -> None:
        self._kernel, self._constants, self._interpreted = kernel, constants, interpreted
        self._variants: dict[tuple[Any, ...], _Variant] = {}

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """Launch on the current stream; the first argument is a tensor. Triton's launch hooks are not called.

        Addresses are handed on as numbers, which Triton takes as they are, where it asks the driver about each tensor:
        all tensors must be on the device of the first.
        """
        if self._interpreted:
            self._kernel[grid](*arguments, **self._constants)
            return
        device = arguments[0].get_device()
        kinds, values = [device], []
        for argument in arguments:
            if type(argument) is int:  # before tensors: that something is none takes long to find out
                kinds.append(_kind_of_int(argument))
                values.append(argument)
            elif isinstance(argument, Tensor):
                address = argument.data_ptr()
                kinds.append((argument.dtype,) if address & 15 else argument.dtype)
                values.append(address)
            else:
                kinds.append(_kind(argument))
                values.append(argument)
        key = tuple(kinds)
        found = self._variants.get(key)
        if found is None:
            compiled = self._kernel[grid](*arguments, **self._constants)
            self._variants[key] = self._prepare(compiled, len(arguments))
            return
        run, stream_of, function, metadata, compiled_in, _ = found
        # Three times None: what hooks would be told, and the hooks before and after.
        run(
            *grid, *_REST[len(grid)], stream_of(device), function, metadata, None, None, None, *values, *compiled_in
        )  # fmt: skip

    def _prepare(self, compiled: Any, num_arguments: int) -> _Variant:
        """What `CompiledKernel.__getitem__` of triton 3.4 to 3.9 puts together anew at each launch."""
        names = self._kernel.arg_names[num_arguments:]
        return _Variant(
            compiled.run,
            triton.runtime.driver.active.get_current_stream,
            compiled.function,
            compiled.packed_metadata,
            tuple(self._constants[name] for name in names),
            compiled,
        )


def _kind_of_int(number: int) -> int:
    """What a kernel is compiled for of a whole number: whether it is 1, a multiple of 16, of 32 bits."""
    kind = 2 if number & 15 else 0
    return (1 if number == 1 else kind) if -0x80000000 <= number < 0x80000000 else kind + 3


def _kind(argument: Any) -> Any:
    """The same of a float, or of a descriptor."""
    if isinstance(argument, float):
        return float
    # A descriptor of a tensor for the copy engine.
    return argument.base.dtype, tuple(argument.block_shape), argument.layout
