"""Which backend serves which phase: a named one is used or refused with every reason, auto takes the fastest that can.

Auto chooses by measurement, among tessera's own backends and those of other packages, or where that is
off by a fixed order, which holds tessera's own alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tessera.attention import cache
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.early import compiling_early
from tessera.attention.hints import PAGE_SIZES, Request, way_out
from tessera.attention.measure import Measured, buckets_for, measure
from tessera.attention.prove import prove_alone
from tessera.attention.registry import BACKENDS as BACKENDS
from tessera.attention.registry import Backend as Backend
from tessera.attention.registry import backend_paths as backend_paths
from tessera.attention.registry import backend_rows as backend_rows
from tessera.attention.registry import check_name, load_checked, plug_ins, reasons_against, rung_of
from tessera.attention.registry import load_backend as load_backend
from tessera.attention.step import Attention, Bucket
from tessera.attention.tune import tune_at_start
from tessera.config import AttentionConfig
from tessera.errors import BackendError, ConfigError
from tessera.log import logger
from tessera.types import AttentionChoice

AUTO = {
    Phase.PREFILL: ("flash_attn:4", "triton", "torch_sdpa", "flex", "naive"),
    Phase.DECODE: ("triton", "torch_sdpa", "flex", "naive"),
    Phase.VISION: ("flash_attn:4", "torch_sdpa", "triton", "naive"),
}
"""What auto tries in each phase where it may not measure, best first; where it may, what it prefers of equals."""
_LAST_RESORTS = {"cuda": ("flex", "naive"), "cpu": ()}
"""Who is timed only where nobody else can serve: on a GPU `flex` compiles for seven seconds, and on an H200 neither
came within twice the time of the fastest in any size of any model that was measured."""
_PAGED = (Phase.PREFILL, Phase.DECODE)


def build_attention(
    config: AttentionConfig, layer_shapes: Sequence[Shape], page_size: int | None, max_len: int | None = None
) -> tuple[Attention, int, list[AttentionChoice]]:
    """Backends for a model, the page size they share, and how each was chosen.

    layer_shapes  of each layer, without a page size; layers of one shape share a backend
    max_len       tokens in the longest sequence: nothing longer is measured

    Raises ConfigError for an unknown name, BackendError where a phase cannot be served: of both, if both fail.
    """
    _refuse_vision(config)
    wanted = {
        Phase.PREFILL: config.prefill_attention or config.attention,
        Phase.DECODE: config.decode_attention or config.attention,
    }
    for name in wanted.values():
        if name != "auto":
            check_name(name)
    unique = list(dict.fromkeys(layer_shapes))
    measures = config.attention_measure != "off"
    general = config.prefill_attention is None and config.decode_attention is None
    page_size = choose_page_size(wanted, page_size, unique, general=general, others=plug_ins() if measures else ())
    layers = Counter(replace(shape, page_size=page_size) for shape in layer_shapes)
    choices, fresh = {}, []
    if measures:
        ours = [phase for phase, name in wanted.items() if name in ("auto", "triton")]
        tune_at_start(ours, list(layers), max_len, anew=config.attention_measure == "force")
    for phase, name in wanted.items():
        if name == "auto" and measures:
            autos = [each for each, of_it in wanted.items() if of_it == "auto"]
            choices[phase], measured = _measured(phase, layers, config.attention_measure, max_len, autos)
            fresh += measured
        else:
            _, choices[phase] = choose(phase, name, list(layers))
    cache.write(fresh)
    groups = [unique.index(shape) for shape in layer_shapes]
    attention, explained = _bind(choices, list(layers), groups)
    return attention, page_size, explained


def choose(phase: Phase, wanted: str, shapes: Sequence[Shape]) -> tuple[Backend, AttentionChoice]:
    """The backend of a phase for all of a model's shapes: the wanted one, or with `auto` the first that can.

    Raises ConfigError for an unknown name, BackendError with every reason where none can serve.
    """
    if wanted != "auto":
        check_name(wanted)
        if reasons := reasons_against(wanted, phase, shapes):
            hint = way_out(Request({phase: wanted}, shapes), [phase], AUTO)
            raise BackendError(f"{wanted} cannot serve {phase}: {'; '.join(reasons)}", hint)
        return load_checked(wanted), AttentionChoice(str(phase), wanted, "named")
    usable, rejected = _candidates(phase, AUTO[phase], shapes)
    if not usable:
        lines = "\n".join(f"{name} cannot serve {phase}: {'; '.join(why)}" for name, why in rejected.items())
        hint = way_out(Request({phase: wanted}, shapes), [phase], AUTO)
        raise BackendError(f"no attention backend can serve {phase}\n{lines}", hint)
    first, *others = usable
    rejected |= {name: [f"{first} stands before it"] for name in others}
    return load_checked(first), AttentionChoice(str(phase), first, "auto: the first that can serve", rejected)


def choose_page_size(
    wanted: Mapping[Phase, str],
    page_size: int | None,
    shapes: Sequence[Shape],
    *,
    general: bool = False,
    others: Sequence[str] = (),
) -> int:
    """The smallest usual page size that the wanted backend of each phase takes, or the given one.

    general  whether --attention named the backend of every phase
    others   what auto may take besides those of its fixed order

    Raises BackendError where there is none: with the reasons of every phase that fails, and a way out.
    """
    for size in PAGE_SIZES if page_size is None else (page_size,):
        sized = [replace(shape, page_size=size) for shape in shapes]
        if all(_can_serve(phase, name, sized, others) for phase, name in wanted.items()):
            return size
    sized = [replace(shape, page_size=page_size) for shape in shapes]
    chosen, errors = {}, {}
    for phase, name in wanted.items():
        try:
            chosen[phase], _ = choose(phase, name, sized)
        except BackendError as error:
            errors[phase] = error.message
    if errors:
        raise BackendError("\n".join(errors.values()), way_out(Request(wanted, sized, general), list(errors), AUTO))
    sizes = ", ".join(map(str, PAGE_SIZES))
    allowed = "; ".join(f"{chosen[p].name} takes {chosen[p].limits[p].page_sizes} for {p}" for p in _PAGED)
    raise BackendError(
        f"{chosen[Phase.PREFILL].name} for prefill and {chosen[Phase.DECODE].name} for decode cannot share a page "
        f"size of {sizes}: {allowed}",
        "choose another --page-size, --prefill-attention or --decode-attention",
    )


def _refuse_vision(config: AttentionConfig) -> None:
    if config.vision_attention not in (None, "auto"):
        check_name(config.vision_attention)
        raise ConfigError(
            f"--vision-attention {config.vision_attention} was asked, the model has no vision tower",
            "leave --vision-attention out",
        )


def _can_serve(phase: Phase, wanted: str, shapes: Sequence[Shape], others: Sequence[str]) -> bool:
    """Whether the wanted backend can; of auto's the slow ones, which import nothing, are asked first."""
    names = [*reversed(AUTO[phase]), *others] if wanted == "auto" else [wanted]
    return any(not reasons_against(name, phase, shapes) for name in names)


def _candidates(phase: Phase, names: Sequence[str], shapes: Sequence[Shape]) -> tuple[list[str], dict[str, list[str]]]:
    """Those of `names` that auto may take, and the reasons against the others.

    On a CPU a sequence's answer must not depend on what else is in its batch, as long as any backend keeps that.
    """
    device_type = shapes[0].device_type
    rejected = {name: reasons_against(name, phase, shapes) for name in names}
    for name in names:
        rejected[name] = rejected[name] or _rung(name) or _costs(name, phase, shapes)
    usable = [name for name in names if not rejected[name]]
    if device_type == "cpu":
        steady = [name for name in usable if device_type in load_checked(name).limits[phase].batch_invariant] or usable
        unsteady = ["does not promise the same bits whatever else is in the batch"]
        rejected |= {name: unsteady for name in usable if name not in steady}
        usable = steady
        for name in usable:
            library, _, variant = name.partition(":")
            if name in BACKENDS and variant and library in usable:
                rejected[name] = [f"{library} serves, which picks the kernel itself"]
    usable = [name for name in usable if not rejected[name]]
    return usable, {name: why for name, why in rejected.items() if why}


def _rung(name: str) -> list[str]:
    """That a backend is a rung of the ladder, which nobody takes who has not named it."""
    rung = rung_of(name)
    return [f"a rung of the ladder, {rung}: to be compared, not chosen"] if rung else []


def _costs(name: str, phase: Phase, shapes: Sequence[Shape]) -> list[str]:
    """Why first use takes long, each reason once."""
    try:
        costs = [load_checked(name).costly(phase, shape) for shape in shapes]
    except Exception as error:  # another package may raise anything; nobody named it
        return [f"costly raises {type(error).__name__}: {error}"]
    return list(dict.fromkeys(cost for cost in costs if cost))


def _unproven(name: str, phase: Phase, shapes: Sequence[Shape], size: Bucket) -> list[str]:
    """Why a plug-in's claim does not hold: a start with proof would stop at it, though nobody named it."""
    try:
        for shape in shapes:
            prove_alone(load_checked(name)(phase, shape), size)
    except Exception as error:
        return [" ".join(str(getattr(error, "message", f"{type(error).__name__}: {error}")).split())[:300]]
    return []


_Fresh = list[tuple[dict[str, str], Measured]]
"""What was measured now, under the key of its cache."""


def _measured(
    phase: Phase, layers: Mapping[Shape, int], mode: str, max_len: int | None, autos: Sequence[Phase]
) -> tuple[AttentionChoice, _Fresh]:
    """Auto's choice by measurement, from the cache where `mode` allows it and what it rests on is still so.

    autos  all phases that auto chooses for: our kernels for them are compiled while libraries are imported
    """
    started = time.perf_counter()
    shapes = list(layers)
    buckets = buckets_for(phase, shapes[0].device_type, max_len)
    key = cache.make_key(phase, layers, buckets)
    found = cache.read(key) if mode == "cached" else None
    if found and _still_holds(phase, found, shapes):
        return found.as_choice(phase, "auto: measured before"), []
    measured = _time(phase, layers, buckets, autos)
    choice = measured.as_choice(phase, "auto: measured")
    lines = "\n".join(table_lines(choice))
    logger.debug("%s attention was measured in %.1f s\n%s", phase, time.perf_counter() - started, lines)
    return choice, [(key, measured)]


def _time(phase: Phase, layers: Mapping[Shape, int], buckets: Sequence[Bucket], autos: Sequence[Phase]) -> Measured:
    """Time every backend that auto may take; BackendError where none answers right."""
    shapes = list(layers)
    preference = dict.fromkeys([*AUTO[phase], *BACKENDS, *plug_ins()])
    with compiling_early(autos, shapes):
        usable, rejected = _candidates(phase, list(preference), shapes)
    waiting = [name for name in rejected if not reasons_against(name, phase, shapes) and _costs(name, phase, shapes)]
    smallest = min(buckets, key=lambda bucket: bucket.num_seqs * bucket.kv_len)
    for name in [name for name in usable if name not in BACKENDS]:
        if problems := _unproven(name, phase, shapes, smallest):
            usable.remove(name)
            rejected[name] = problems
    last = [name for name in usable if name in _LAST_RESORTS[shapes[0].device_type]]
    first = [name for name in usable if name not in last]
    measured = Measured([])
    for names in filter(None, (first, last)):
        if measured.buckets:
            rejected |= {name: ["not timed: a last resort here, and others can serve"] for name in names}
            break
        rejected |= measured.rejected
        logger.info("measuring %s attention: %s", phase, ", ".join(names))
        measured = measure(phase, [load_checked(name) for name in names], layers, buckets)
    if not measured.buckets:
        lines = "\n".join(f"{name}: {'; '.join(why)}" for name, why in (measured.rejected | rejected).items())
        raise BackendError(f"no attention backend passes for {phase}\n{lines}", f"name one with --{phase}-attention")
    return Measured(measured.buckets, rejected | measured.rejected, waiting)


def _still_holds(phase: Phase, found: Measured, shapes: Sequence[Shape]) -> bool:
    """Whether the winners can serve, and whoever had to be compiled first still has to be."""
    names, known = {bucket.backend for bucket in found.buckets}, backend_paths()
    serve = all(name in known and not reasons_against(name, phase, shapes) for name in names)
    return serve and all(name in known and _costs(name, phase, shapes) for name in found.waiting)


def table_lines(choice: AttentionChoice) -> list[str]:
    """One line a measured size: the winner, the runner-up, and all times in ms; then why others serve none."""
    lines = []
    for bucket in choice.buckets:
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in bucket.times_ms.items())
        runner_up = f"before {bucket.runner_up}" if bucket.runner_up else "alone"
        lines.append(f"  {bucket.size:<14} {bucket.backend} {runner_up} (ms: {times})")
    return lines + [f"  not {name}: {'; '.join(reasons)}" for name, reasons in choice.rejected.items()]


def _bind(
    choices: Mapping[Phase, AttentionChoice], shapes: Sequence[Shape], groups: Sequence[int]
) -> tuple[Attention, list[AttentionChoice]]:
    """The chosen backends, bound; and the choices, whose reasons say where the options of the backends come from."""
    backends, buckets, explained = {}, {}, []
    for phase, choice in choices.items():
        bound = {name: [_bound(name, phase, shape) for shape in shapes] for name in choice.backends}
        backends[phase] = bound[choice.backend]
        if len(bound) > 1:
            buckets[phase] = {Bucket(b.num_seqs, b.q_len, b.kv_len): bound[b.backend] for b in choice.buckets}
        sources = [f"{name}: {each.options_from}" for name in bound for each in bound[name] if each.options_from]
        explained.append(replace(choice, reason="; ".join([choice.reason, *dict.fromkeys(sources)])))
    return Attention(backends, groups, buckets), explained


def _bound(name: str, phase: Phase, shape: Shape) -> AttentionBackend[Any]:
    backend = load_checked(name)
    try:
        return backend(phase, shape)
    except Exception as error:  # a library may raise anything when it is set up
        raise BackendError(
            f"{name} cannot be set up for {phase}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            f"use another --{phase}-attention",
        ) from error
