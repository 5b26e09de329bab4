"""The names of attention backends: tessera's own and those of other packages, imported only when asked for.

Other packages add theirs through the entry-point group `tessera.attention`. One that is broken, or
that takes a name which is taken, is a reason in a row and an error for whoever names it; nobody else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.names import meant_by
from tessera.errors import BackendError, ConfigError

Backend = type[AttentionBackend[Any]]

# Library -> variant -> class, of the module that has the library's name, or module:class.
_OURS = {
    "flash_attn": {"4": "FlashAttn4", "3": "FlashAttn3", "2": "FlashAttn2"},
    "flashinfer": {
        "fa2": "FlashInferFa2",
        "fa3": "FlashInferFa3",
        "tensor_cores": "FlashInferTensorCores",
        "cuda_cores": "FlashInferCudaCores",
    },
    "triton": {
        "": "Triton",
        "two_pass": "triton_ladder:TritonTwoPass",
        "fa1": "triton_ladder:TritonFa1",
        "fa2": "triton_ladder:TritonFa2",
        "paged": "triton_decode:TritonPaged",
        "flash_decoding": "triton_decode:TritonFlashDecoding",
        "flash_decoding_pp": "triton_decode:TritonFlashDecodingPP",
    },
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
    f"{library}:{variant}" if variant else library: "tessera.attention.backends."
    + (where if ":" in where else f"{library}:{where}")
    for library, variants in _OURS.items()
    for variant, where in variants.items()
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


def plug_ins() -> list[str]:
    """The names that other packages bring, those of ours that they bring again left out."""
    return [name for name in _all_paths() if name not in BACKENDS]


def plug_in_sources() -> list[str]:
    """What each plug-in comes from: its name, its class, and the distribution that registers it with its version."""
    points = [point for point in _registered() if point.name not in BACKENDS]
    packages = [f"{point.dist.name} {point.dist.version}" if point.dist else "no package" for point in points]
    return sorted(f"{point.name} = {point.value} of {package}" for point, package in zip(points, packages))


def check_name(name: str, *, auto: bool = True) -> None:
    """Raise ConfigError for a name that nothing or more than one thing has, or that is a library with variants.

    auto  whether that word could have been given here, so that a hint may offer it
    """
    paths = _all_paths()
    if name not in paths:
        raise _unknown(name, ["auto", *paths] if auto else list(paths))
    if len(paths[name]) > 1:
        raise ConfigError(_clash(name, paths[name]), f"uninstall the package that brings {paths[name][-1]}")


def load_backend(name: str) -> Backend:
    """The class that a user's name stands for.

    ConfigError as for `check_name`, and for `auto`; BackendError where the module that holds it does not import or
    holds no backend of this name. Whether it can serve anything is another question: `reasons_against`.
    """
    check_name(name, auto=False)
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


def class_of(name: str) -> Backend | None:
    """The class of a name that there is; None where it does not import or is no backend."""
    return _import(name, BACKENDS.get(name) or backend_paths()[name])[0]


def rung_of(name: str) -> str | None:
    """The idea that a backend stands for which exists to be compared with its better; None: it exists to serve."""
    return getattr(class_of(name), "rung", None)


def reasons_against(name: str, phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    """Every reason why the backend of this name cannot serve a phase of all these shapes; never raises.

    A name of ours stands for our class here, whoever else uses it, so that auto takes no other.
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
    for point in _registered():
        of_name = paths.setdefault(point.name, [])
        if point.value not in of_name:
            of_name.append(point.value)
    return paths


def _registered() -> EntryPoints:
    """What the installed packages register."""
    return _search(entry_points, tuple(sys.path))


@cache
def _search(search: Callable[..., EntryPoints], _path: tuple[str, ...]) -> EntryPoints:
    """Kept, for asking every installed package takes longer than all else that choosing again does: what is installed
    while a process runs is seen by the next, or where it came with a new folder on the path.
    """
    return search(group=ENTRY_POINT_GROUP)


def _import(name: str, path: str) -> tuple[Backend | None, str]:
    """The class at `path`, or None and what is wrong with it."""
    module, _, attribute = path.partition(":")
    try:
        backend = getattr(import_module(module), attribute)
    except (Exception, SystemExit) as error:  # another package's module may raise anything; it is reported, not hidden
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
        if phase not in backend.limits:
            reasons = reasons or [f"no {phase} kernel"]
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
    listed = ", ".join(known)
    if name == "auto":
        said = f"auto is no attention backend but the choice between them, there are: {listed}"
        return ConfigError(said, "name one, see `tessera backends`")
    *others, last = meant_by(name, known) or [""]
    meant = f"{', '.join(others)} or {last}" if others else last
    hint = f"did you mean {meant}?" if meant else "see `tessera backends`"
    return ConfigError(f"unknown attention backend {name!r}, there are: {listed}", hint)
