"""The cases that options ask for: workloads x heads x dtypes x windows, of a preset or of a user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tessera.attention.contract import Phase, Shape
from tessera.bench.kernels.cases import (
    LADDER,
    PRESETS,
    Group,
    Heads,
    KernelCase,
    Part,
    parse_heads,
    parse_workload,
    parse_workloads,
    parts_of,
)
from tessera.bench.kernels.options import KernelOptions
from tessera.errors import ConfigError
from tessera.runner.device import choose_dtype, dtype_name

PAGE_SIZE = 16
"""Where none is asked for."""
_PAGED = (Phase.PREFILL, Phase.DECODE)
_DTYPES = ("float32", "bfloat16", "float16")


def make_cases(
    options: KernelOptions, device: torch.device, model_shapes: Callable[[], Sequence[Shape]], *, model_named: bool
) -> list[KernelCase]:
    """Every case that the options name, in their order, none twice.

    model_shapes  what the model's layers ask, called only where its heads are wanted
    model_named   whether the user named the model, whose heads then stand in for those of a preset

    ConfigError for what is outside a grammar, for options that exclude each other, and for options that no case heeds.
    """
    if options.heads is not None and model_named:
        raise ConfigError(f"--heads {options.heads} and --model both say which heads", "leave one of them out")
    if options.mode == "graph" and device.type != "cuda":
        raise ConfigError(f"--graph asks for CUDA graphs, the device is {device.type}", "leave --graph out")
    grid = _Grid(options, device, model_shapes, model_named)
    cases = list(dict.fromkeys(case for case in grid.cases()))
    if not cases:
        raise ConfigError(f"--phases {options.phases} leaves nothing to run", "name another of prefill, decode, vision")
    paged = (("--page-size", options.page_size), ("--window", options.window), ("--soft-cap", options.soft_cap))
    for flag, value in paged:
        if value is not None and all(case.page_size is None for case in cases):
            given = f"{value:g}" if isinstance(value, float) else str(value)
            raise ConfigError(f"{flag} {given} means nothing in vision, and all cases are vision", f"leave out {flag}")
    return cases


class _Grid:
    def __init__(
        self, options: KernelOptions, device: torch.device, shapes: Callable[[], Sequence[Shape]], model_named: bool
    ) -> None:
        self._options, self._device, self._shapes_of = options, device, shapes
        self._model_named = model_named
        self._phases = _parse_phases(options.phases)
        self._heads = parse_heads(options.heads) if options.heads is not None else None
        self._shapes: list[Shape] = []

    def cases(self) -> Iterator[KernelCase]:
        """Dtypes inside heads inside workloads."""
        for groups, own_heads, phases in self._workloads():
            for parts in self._parts(groups, phases):
                for heads, windows in self._heads_of(own_heads):
                    for dtype in self._dtypes(heads_are_model=own_heads is None):
                        yield from self._of(parts, heads, dtype, windows)

    def _of(self, parts: tuple[Part, ...], heads: Heads, dtype: str, windows: list[int | None]) -> Iterator[KernelCase]:
        options = self._options
        if parts[0].phase is Phase.VISION:
            yield KernelCase(parts, heads, dtype, None, mode=options.mode)
            return
        for window in windows:
            page_size = PAGE_SIZE if options.page_size is None else options.page_size
            yield KernelCase(parts, heads, dtype, page_size, window, options.soft_cap, options.mode)

    def _workloads(self) -> Iterator[tuple[tuple[Group, ...], Heads | None, Sequence[Phase]]]:
        """Groups, the heads that belong to them, and the phases that they are made for."""
        options = self._options
        if options.workloads is not None:
            if options.preset is not None:
                said = f"--preset {options.preset} and --workloads both say what is run"
                raise ConfigError(said, "leave one of them out")
            for groups in parse_workloads(options.workloads):
                yield groups, None, self._phases or _PAGED
            return
        for entry in PRESETS[self._device.type, options.preset or (LADDER if options.ladder else "smoke")]:
            made_for = (Phase.VISION,) if entry.vision else _PAGED
            wanted = [phase for phase in made_for if self._phases is None or phase in self._phases]
            if wanted:
                yield parse_workload(entry.workload), parse_heads(entry.heads)[0], wanted

    def _parts(self, groups: tuple[Group, ...], phases: Sequence[Phase]) -> list[tuple[Part, ...]]:
        found = list(parts_of(groups, phases))
        if not found and self._options.workloads is not None:
            named, text = ",".join(phases), "_".join(str(group) for group in groups)
            why = "vision takes sequences without a past" if Phase.VISION in phases else "one new token is decode"
            raise ConfigError(f"workload {text} has nothing for {named}: {why}", "mend --phases or --workloads")
        return found

    def _heads_of(self, own: Heads | None) -> Iterator[tuple[Heads, list[int | None]]]:
        """Heads, each with the windows that their layers have."""
        asked = [self._options.window]
        if self._heads is not None:
            yield from ((heads, asked) for heads in self._heads)
        elif own is not None and not self._model_named:
            yield own, asked
        else:
            shape = self._model()[0]
            windows = [each.window for each in self._model()] if self._options.window is None else asked
            yield Heads(shape.num_q_heads, shape.num_kv_heads, shape.head_dim), windows

    def _dtypes(self, *, heads_are_model: bool) -> list[str]:
        named = [word.strip() for word in self._options.dtypes.split(",")]
        for word in named:
            if word not in (*_DTYPES, "auto"):
                said = f"--dtypes has {word!r}, which is none of {', '.join(_DTYPES)}, auto"
                raise ConfigError(said, "use --dtypes bfloat16,float32")
        use_model = self._model_named or (heads_are_model and self._heads is None)
        return list(dict.fromkeys(self._auto_dtype(use_model) if word == "auto" else word for word in named))

    def _auto_dtype(self, use_model: bool) -> str:
        return dtype_name(self._model()[0].dtype if use_model else choose_dtype("auto", torch.bfloat16, self._device))

    def _model(self) -> list[Shape]:
        self._shapes = self._shapes or list(self._shapes_of())
        return self._shapes


def _parse_phases(text: str | None) -> list[Phase] | None:
    """ConfigError for a word that is no phase."""
    if text is None:
        return None
    found = []
    for word in text.split(","):
        if word.strip() not in list(Phase):
            said = f"--phases has {word.strip()!r}, which is none of {', '.join(Phase)}"
            raise ConfigError(said, "use --phases prefill,decode")
        found.append(Phase(word.strip()))
    return found
