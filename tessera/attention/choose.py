"""Which backend serves which phase: a named one is used or refused with every reason, auto takes the first that can.

Backends are dotted paths, imported only when asked for. Other packages add theirs through the
entry-point group `tessera.attention`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.step import Attention
from tessera.config import AttentionConfig
from tessera.errors import BackendError, ConfigError
from tessera.types import AttentionChoice

Backend = type[AttentionBackend[Any]]

_OURS = {
    "flash_attn": {"4": "FlashAttn4", "3": "FlashAttn3", "2": "FlashAttn2"},
    "flashinfer": {
        "fa2": "FlashInferFa2",
        "fa3": "FlashInferFa3",
        "tensor_cores": "FlashInferTensorCores",
        "cuda_cores": "FlashInferCudaCores",
    },
    "triton": {"": "Triton"},
    "xformers": {"": "XFormers"},
    "torch_sdpa": {
        "": "TorchSdpa",
        "flash": "TorchSdpaFlash",
        "cudnn": "TorchSdpaCudnn",
        "efficient": "TorchSdpaEfficient",
        "math": "TorchSdpaMath",
    },
    "flex": {"": "Flex"},
    "numba": {"": "Numba"},
    "naive": {"": "Naive"},
}
BACKENDS = {
    f"{library}:{variant}" if variant else library: f"tessera.attention.backends.{library}:{class_name}"
    for library, variants in _OURS.items()
    for variant, class_name in variants.items()
}
"""Name -> module:class of the backends that tessera brings."""
AUTO = {Phase.PREFILL: ("torch_sdpa", "naive"), Phase.DECODE: ("torch_sdpa", "naive")}
"""What auto tries in each phase, best first."""
ENTRY_POINT_GROUP = "tessera.attention"
PAGE_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class BackendRow:
    """One line of `tessera backends`."""

    name: str
    phase: Phase
    usable: bool
    reasons: list[str]
    """Why it is not usable."""


def backend_paths() -> dict[str, str]:
    """Name -> module:class of every backend, those of other packages included; ConfigError where names clash."""
    paths = dict(BACKENDS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if paths.get(point.name, point.value) != point.value:
            raise ConfigError(
                f"two attention backends are named {point.name}: {paths[point.name]} and {point.value}",
                f"uninstall the package that brings {point.value}",
            )
        paths[point.name] = point.value
    return paths


def backend_rows(shape: Shape) -> list[BackendRow]:
    """Every backend in every phase, with the reasons against it; `shape.page_size` may be None."""
    return [
        BackendRow(name, phase, not reasons, reasons)
        for name in backend_paths()
        for phase in Phase
        for reasons in (_reasons_against(name, phase, [shape]),)
    ]


def choose(phase: Phase, wanted: str, shapes: Sequence[Shape]) -> tuple[Backend, AttentionChoice]:
    """The backend of a phase for all of a model's shapes: the wanted one, or with `auto` the first that can.

    Raises ConfigError for an unknown name, BackendError with every reason where none can serve.
    """
    if wanted != "auto":
        _check_name(wanted)
        if reasons := _reasons_against(wanted, phase, shapes):
            raise BackendError(f"{wanted} cannot serve {phase}: {'; '.join(reasons)}", _hint(wanted, phase, shapes))
        return _load(wanted), AttentionChoice(str(phase), wanted, "named")
    reasons_of = {name: _reasons_against(name, phase, shapes) for name in AUTO[phase]}
    usable = [name for name, reasons in reasons_of.items() if not reasons]
    if not usable:
        lines = "\n".join(f"{name} cannot serve {phase}: {'; '.join(reasons_of[name])}" for name in AUTO[phase])
        raise BackendError(f"no attention backend can serve {phase}\n{lines}", _hint("auto", phase, shapes))
    rejected = {name: reasons or [f"{usable[0]} stands before it"] for name, reasons in reasons_of.items()}
    del rejected[usable[0]]
    return _load(usable[0]), AttentionChoice(str(phase), usable[0], "auto: the first that can serve", rejected)


def choose_page_size(prefill: Backend, decode: Backend, wanted: int | None, shapes: Sequence[Shape]) -> int:
    """The smallest usual page size that both phases take, or the wanted one; BackendError where one does not."""
    for page_size in PAGE_SIZES if wanted is None else (wanted,):
        if not _page_size_problems(prefill, decode, page_size, shapes):
            return page_size
    allowed = "; ".join(
        f"{backend.name} takes {backend.limits[phase].page_sizes} for {phase}"
        for phase, backend in ((Phase.PREFILL, prefill), (Phase.DECODE, decode))
    )
    size = f"page size {wanted}" if wanted is not None else f"a page size of {', '.join(map(str, PAGE_SIZES))}"
    raise BackendError(
        f"{prefill.name} for prefill and {decode.name} for decode cannot share {size}: {allowed}",
        "choose another --page-size, --prefill-attention or --decode-attention",
    )


def build_attention(
    config: AttentionConfig, layer_shapes: Sequence[Shape], page_size: int | None
) -> tuple[Attention, int, list[AttentionChoice]]:
    """Backends for a model, the page size they share, and how each was chosen.

    layer_shapes  of each layer, without a page size; layers of one shape share a backend

    Raises ConfigError for an unknown name, BackendError where a phase cannot be served: of both, if both fail.
    """
    shapes = [replace(shape, page_size=page_size) for shape in dict.fromkeys(layer_shapes)]
    layer_groups = [shapes.index(replace(shape, page_size=page_size)) for shape in layer_shapes]
    chosen = _choose_both(config, shapes)
    (prefill, _), (decode, _) = chosen[Phase.PREFILL], chosen[Phase.DECODE]
    page_size = choose_page_size(prefill, decode, page_size, shapes)
    bound = [replace(shape, page_size=page_size) for shape in shapes]
    backends = {phase: [backend(phase, shape) for shape in bound] for phase, (backend, _) in chosen.items()}
    return Attention(backends, layer_groups), page_size, [choice for _, choice in chosen.values()]


def _choose_both(config: AttentionConfig, shapes: Sequence[Shape]) -> dict[Phase, tuple[Backend, AttentionChoice]]:
    wanted = {
        Phase.PREFILL: config.prefill_attention or config.attention,
        Phase.DECODE: config.decode_attention or config.attention,
    }
    chosen, errors = {}, []
    for phase, name in wanted.items():
        try:
            chosen[phase] = choose(phase, name, shapes)
        except BackendError as error:
            errors.append(error)
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise BackendError("\n".join(error.message for error in errors), "\n".join(hints) or None)
    return chosen


def _check_name(name: str) -> None:
    known = list(backend_paths())
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"unknown attention backend {name!r}, there are: auto, {', '.join(known)}",
            f"did you mean {near[0]}?" if near else "see `tessera backends`",
        )


def _load(name: str) -> Backend:
    """Import a backend; whatever its module raises is passed on."""
    module, _, attribute = _path(name).partition(":")
    backend = getattr(import_module(module), attribute)
    if not (isinstance(backend, type) and issubclass(backend, AttentionBackend)):
        raise TypeError(f"{module}:{attribute} is not an AttentionBackend")
    return backend


def _path(name: str) -> str:
    # Searching the installed packages takes longer than choosing: our own names need no search.
    return BACKENDS.get(name) or backend_paths()[name]


def _reasons_against(name: str, phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    try:
        backend = _load(name)
    except Exception as error:  # another package's module may raise anything; it is reported, not hidden
        return [f"import {_path(name)}: {error}"]
    return list(dict.fromkeys(reason for shape in shapes for reason in backend.reasons_against(phase, shape)))


def _hint(wanted: str, phase: Phase, shapes: Sequence[Shape]) -> str | None:
    """What mends a refusal: a page size that the wanted backend takes, a backend that can serve."""
    mends = []
    for page_size in PAGE_SIZES:
        resized = [replace(shape, page_size=page_size) for shape in shapes]
        if wanted != "auto" and not _reasons_against(wanted, phase, resized):
            mends.append(f"--page-size {page_size}")
            break
    others = [name for name in backend_paths() if name != wanted and not _reasons_against(name, phase, shapes)]
    mends += [f"--{phase}-attention {name}" for name in others[:1]]
    return f"use {' or '.join(mends)}" if mends else None


def _page_size_problems(prefill: Backend, decode: Backend, page_size: int, shapes: Sequence[Shape]) -> list[str]:
    return [
        reason
        for phase, backend in ((Phase.PREFILL, prefill), (Phase.DECODE, decode))
        for shape in shapes
        for reason in backend.reasons_against(phase, replace(shape, page_size=page_size))
    ]
