"""What mends a refusal of named backends: another page size, an installation, another flag, another backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import class_of, reasons_against

PAGE_SIZES = (16, 32, 64, 128, 256)
"""Tokens a page that are tried where none is named."""
_PAGED = (Phase.PREFILL, Phase.DECODE)


@dataclass(frozen=True)
class Request:
    """What a user asked for."""

    wanted: Mapping[Phase, str]
    shapes: Sequence[Shape]
    general: bool = False
    """Whether --attention alone named the backend, for all phases."""


def way_out(request: Request, refused: Sequence[Phase], preferred: Mapping[Phase, Sequence[str]]) -> str | None:
    """What to do about each refused backend; None where nothing helps.

    preferred  of each phase, the backends to offer in place of a refused one, best first
    """
    lines = []
    for name in dict.fromkeys(request.wanted[phase] for phase in refused):
        of_name = [phase for phase in refused if request.wanted[phase] == name]
        lines.append(_line(request, name, of_name, preferred))
    return "; ".join(line for line in lines if line) or None


def needs_only_installing(reasons: Sequence[str]) -> bool:
    """Whether all that is against a backend is that something is not installed."""
    return bool(reasons) and all(reason.endswith("is not installed") for reason in reasons)


def _line(
    request: Request, name: str, refused: Sequence[Phase], preferred: Mapping[Phase, Sequence[str]]
) -> str | None:
    """What mends the refusal of one backend in these phases."""
    install, mends = None, []
    if name != "auto":
        install = _installation(request, name, refused)
        if size := _page_size(request, name, refused):
            mends.append(f"--page-size {size}")
        if request.general and (served := [phase for phase in _PAGED if phase not in refused]):
            return _join(install, [*mends, f"--{served[0]}-attention {name} in place of --attention"])
    return _join(install, mends + _others(request, name, refused, preferred))


def _join(install: str | None, mends: Sequence[str]) -> str | None:
    use = f"use {' or '.join(mends)}" if mends else None
    return ", or ".join(part for part in (install, use) if part) or None


def _page_size(request: Request, name: str, phases: Sequence[Phase]) -> int | None:
    """One that alone is in the way of all these phases."""
    return next((size for size in PAGE_SIZES if not any(_reasons(request, name, p, size) for p in phases)), None)


def _installation(request: Request, name: str, refused: Sequence[Phase]) -> str | None:
    """What installs a library that would then serve, and the flag without which it still would not."""
    backend = class_of(name)
    if backend is None or backend.install is None:
        return None
    helped: list[Phase] = []
    flags: list[str] = []
    for size in (None, *PAGE_SIZES):  # None: the size that was asked for, or none yet
        helped = [phase for phase in refused if needs_only_installing(_reasons(request, name, phase, size))]
        if helped:
            flags = [] if size is None else [f"--page-size {size}"]
            break
    if len(helped) < len(refused):
        if not (helped and request.general):
            return None
        flags.append(f"--{helped[0]}-attention {name} in place of --attention")
    return f"{backend.install} and use {' and '.join(flags)}" if flags else backend.install


def _reasons(request: Request, name: str, phase: Phase, page_size: int | None) -> list[str]:
    """Against the backend with this page size, or where it is None with the one that was asked for."""
    sized = [replace(shape, page_size=page_size or shape.page_size) for shape in request.shapes]
    return reasons_against(name, phase, sized)


def _others(
    request: Request, name: str, refused: Sequence[Phase], preferred: Mapping[Phase, Sequence[str]]
) -> list[str]:
    """The flags that name another backend: one for all refused phases if there is such, or one for each phase."""
    able = {
        phase: [n for n in preferred[phase] if n != name and not reasons_against(n, phase, request.shapes)]
        for phase in refused
    }
    shared = [other for other in able[refused[0]] if all(other in names for names in able.values())]
    if shared and request.general and set(refused) == set(_PAGED):
        return [f"--attention {shared[0]}"]
    flags = [f"--{phase}-attention {(shared or names)[0]}" for phase, names in able.items() if names]
    return [" ".join(flags)] if flags else []
