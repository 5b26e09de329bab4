"""The names of attention backends: tessera's own and those of other packages, imported only when asked for.

Other packages add theirs through the entry-point group `tessera.attention`. One that is broken, or
that takes a name which is taken, is a reason in a row and an error for whoever names it; nobody else.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.errors import BackendError, ConfigError

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
    "naive": {"": "Naive"},
}
BACKENDS = {
    f"{library}:{variant}" if variant else library: f"tessera.attention.backends.{library}:{class_name}"
    for library, variants in _OURS.items()
    for variant, class_name in variants.items()
}
"""Name -> module:class of the backends that tessera brings."""
ENTRY_POINT_GROUP = "tessera.attention"
_LEFTOVER = re.compile(r"(VLLM|SGLANG|SGL)_\w*(ATTENTION|ATTN)\w*")


@dataclass(frozen=True)
class BackendRow:
    """One line of `tessera backends`."""

    name: str
    phase: Phase
    usable: bool
    reasons: list[str]
    """Why it is not usable."""
    notes: list[str]
    """What a user should know although it is."""


def backend_paths() -> dict[str, str]:
    """Name -> module:class of every backend, those of other packages included; of a name that clashes, the first."""
    return {name: paths[0] for name, paths in _all_paths().items()}


def check_name(name: str) -> None:
    """Raise ConfigError for a name that nothing or more than one thing has, or that is a library with variants."""
    paths = _all_paths()
    if name not in paths:
        raise _unknown(name, list(paths))
    if len(paths[name]) > 1:
        raise ConfigError(_clash(name, paths[name]), f"uninstall the package that brings {paths[name][-1]}")


def load_backend(name: str) -> Backend:
    """The class that a user's name stands for.

    ConfigError as for `check_name`; BackendError where the module that holds it does not import or holds no
    backend of this name. Whether it can serve anything is another question: `reasons_against`.
    """
    check_name(name)
    backend, problem = _import(name, backend_paths()[name])
    if backend is None:
        hint = None if name in BACKENDS else "mend or uninstall the package that registers it"
        raise BackendError(f"attention backend {name}: {problem}", hint)
    return backend


def load_checked(name: str) -> Backend:
    """The class of a name that has no reasons against it."""
    backend, problem = _import(name, BACKENDS.get(name) or backend_paths()[name])
    assert backend is not None, problem
    return backend


def install_line(name: str) -> str | None:
    """What installs the library of a backend, where its class tells."""
    backend, _ = _import(name, BACKENDS.get(name) or backend_paths()[name])
    return backend.install if backend else None


def reasons_against(name: str, phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    """Every reason why the backend of this name cannot serve a phase of all these shapes; never raises.

    Searching the installed packages takes longer than choosing, so names of ours are not searched for.
    """
    paths = [BACKENDS[name]] if name in BACKENDS else _all_paths()[name]
    return _reasons(name, paths, phase, shapes)


def backend_rows(shapes: Sequence[Shape]) -> list[BackendRow]:
    """Every backend in every phase, usable where every one of a model's shapes is; `page_size` may be None."""
    rows = []
    for name, paths in _all_paths().items():
        for phase in Phase:
            reasons = _reasons(name, paths, phase, shapes)
            notes = [] if reasons else _notes(name, paths[0], phase, shapes)
            rows.append(BackendRow(name, phase, not reasons, reasons, notes))
    return rows


def shape_in(phase: Phase, shape: Shape) -> Shape:
    """What a layer of these heads asks in this phase: VISION knows no pages, masks or sinks."""
    if phase is not Phase.VISION:
        return shape
    return replace(shape, page_size=None, window=None, soft_cap=None, sinks=False, causal=False)


def leftover_warnings(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A sentence for each variable that chooses attention in another engine and does nothing here."""
    return [
        f"environment variable {name}={value} has no effect on tessera: attention is chosen by --attention, "
        "--prefill-attention and --decode-attention"
        for name, value in environment.items()
        if _LEFTOVER.fullmatch(name)
    ]


def _all_paths() -> dict[str, list[str]]:
    """Name -> every module:class that is registered under it."""
    paths = {name: [path] for name, path in BACKENDS.items()}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        of_name = paths.setdefault(point.name, [])
        if point.value not in of_name:
            of_name.append(point.value)
    return paths


def _import(name: str, path: str) -> tuple[Backend | None, str]:
    """The class at `path`, or None and what is wrong with it."""
    module, _, attribute = path.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except Exception as error:  # another package's module may raise anything; it is reported, not hidden
        return None, f"import {path} fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not (isinstance(backend, type) and issubclass(backend, AttentionBackend)):
        return None, f"{path} is not an AttentionBackend"
    if (own := getattr(backend, "name", None)) != name:
        return None, f"{path} is registered as {name} and calls itself {own}"
    return backend, ""


def _reasons(name: str, paths: Sequence[str], phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    if len(paths) > 1:
        return [_clash(name, paths)]
    backend, problem = _import(name, paths[0])
    if backend is None:
        return [problem]
    try:
        reasons = [why for shape in shapes for why in backend.reasons_against(phase, shape_in(phase, shape))]
    except Exception as error:
        return [f"reasons_against raises {type(error).__name__}: {error}"]
    return list(dict.fromkeys(reasons))


def _notes(name: str, path: str, phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    backend, _ = _import(name, path)
    assert backend is not None
    return list(dict.fromkeys(note for shape in shapes for note in backend.limits[phase].notes(shape)))


def _clash(name: str, paths: Sequence[str]) -> str:
    return f"{len(paths)} attention backends are named {name}: {' and '.join(paths)}"


def _unknown(name: str, known: list[str]) -> ConfigError:
    if variants := [other for other in known if other.startswith(f"{name}:")]:
        return ConfigError(f"{name} is a library with variants: {', '.join(variants)}", f"name one, as {variants[0]}")
    near = difflib.get_close_matches(name, ["auto", *known], n=1)
    return ConfigError(
        f"unknown attention backend {name!r}, there are: auto, {', '.join(known)}",
        f"did you mean {near[0]}?" if near else "see `tessera backends`",
    )
