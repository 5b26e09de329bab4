"""Which backend serves which phase: a named one is used or refused with every reason, auto takes the fastest that can.

Auto chooses by measurement, or where that is off by a fixed order. It takes none but tessera's own
backends: those of other packages serve when they are named.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tessera.attention import cache
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.measure import Measured, buckets_for, measure
from tessera.attention.registry import BACKENDS as BACKENDS
from tessera.attention.registry import Backend as Backend
from tessera.attention.registry import backend_paths as backend_paths
from tessera.attention.registry import backend_rows as backend_rows
from tessera.attention.registry import check_name, install_line, load_checked, reasons_against
from tessera.attention.registry import load_backend as load_backend
from tessera.attention.step import Attention, Bucket
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
PAGE_SIZES = (16, 32, 64, 128, 256)
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
    page_size = choose_page_size(wanted, page_size, unique)
    layers = Counter(replace(shape, page_size=page_size) for shape in layer_shapes)
    choices = {
        phase: _measured(phase, layers, config.attention_measure, max_len)
        if name == "auto" and config.attention_measure != "off"
        else choose(phase, name, list(layers))[1]
        for phase, name in wanted.items()
    }
    groups = [unique.index(shape) for shape in layer_shapes]
    return _bind(choices, list(layers), groups), page_size, list(choices.values())


def choose(phase: Phase, wanted: str, shapes: Sequence[Shape]) -> tuple[Backend, AttentionChoice]:
    """The backend of a phase for all of a model's shapes: the wanted one, or with `auto` the first that can.

    Raises ConfigError for an unknown name, BackendError with every reason where none can serve.
    """
    if wanted != "auto":
        check_name(wanted)
        if reasons := reasons_against(wanted, phase, shapes):
            raise BackendError(f"{wanted} cannot serve {phase}: {'; '.join(reasons)}", _hint(wanted, phase, shapes))
        return load_checked(wanted), AttentionChoice(str(phase), wanted, "named")
    usable, rejected = _candidates(phase, AUTO[phase], shapes)
    if not usable:
        lines = "\n".join(f"{name} cannot serve {phase}: {'; '.join(why)}" for name, why in rejected.items())
        raise BackendError(f"no attention backend can serve {phase}\n{lines}", _hint("auto", phase, shapes))
    first, *others = usable
    rejected |= {name: [f"{first} stands before it"] for name in others}
    return load_checked(first), AttentionChoice(str(phase), first, "auto: the first that can serve", rejected)


def choose_page_size(wanted: Mapping[Phase, str], page_size: int | None, shapes: Sequence[Shape]) -> int:
    """The smallest usual page size that the wanted backend of each phase takes, or the given one.

    Raises BackendError where there is none: with the reasons of every phase that fails, and a way out.
    """
    for size in PAGE_SIZES if page_size is None else (page_size,):
        sized = [replace(shape, page_size=size) for shape in shapes]
        if all(_can_serve(phase, name, sized) for phase, name in wanted.items()):
            return size
    sized = [replace(shape, page_size=page_size) for shape in shapes]
    chosen, errors = {}, []
    for phase, name in wanted.items():
        try:
            chosen[phase], _ = choose(phase, name, sized)
        except BackendError as error:
            errors.append(error)
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise BackendError("\n".join(error.message for error in errors), "\n".join(hints) or None)
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


def _can_serve(phase: Phase, wanted: str, shapes: Sequence[Shape]) -> bool:
    """Whether the wanted backend can; of auto's the slow ones, which import nothing, are asked first."""
    names = reversed(AUTO[phase]) if wanted == "auto" else [wanted]
    return any(not reasons_against(name, phase, shapes) for name in names)


def _candidates(phase: Phase, names: Sequence[str], shapes: Sequence[Shape]) -> tuple[list[str], dict[str, list[str]]]:
    """Those of `names` that auto may take, and the reasons against the others.

    On a CPU a sequence's answer must not depend on what else is in its batch, as long as any backend keeps that.
    """
    device_type = shapes[0].device_type
    rejected = {name: reasons_against(name, phase, shapes) for name in names}
    for name in names:
        if not rejected[name]:
            costs = (load_checked(name).costly(phase, shape) for shape in shapes)
            rejected[name] = list(dict.fromkeys(cost for cost in costs if cost))
    usable = [name for name in names if not rejected[name]]
    if device_type == "cpu":
        steady = [name for name in usable if device_type in load_checked(name).limits[phase].batch_invariant] or usable
        unsteady = ["does not promise the same bits whatever else is in the batch"]
        rejected |= {name: unsteady for name in usable if name not in steady}
        usable = steady
        for name in usable:
            library, _, variant = name.partition(":")
            if variant and library in usable:
                rejected[name] = [f"{library} serves, which picks the kernel itself"]
    usable = [name for name in usable if not rejected[name]]
    return usable, {name: why for name, why in rejected.items() if why}


def _measured(phase: Phase, layers: Mapping[Shape, int], mode: str, max_len: int | None) -> AttentionChoice:
    """Auto's choice by measurement, from the cache where `mode` allows it and the winners can still serve."""
    started = time.perf_counter()
    shapes = list(layers)
    buckets = buckets_for(phase, shapes[0].device_type, max_len)
    key = cache.make_key(phase, layers, buckets)
    found = cache.read(key) if mode == "cached" else None
    if found and _still_serves(phase, found, shapes):
        return _as_choice(phase, found, "auto: measured before")
    order = list(dict.fromkeys([*AUTO[phase], *BACKENDS]))
    usable, rejected = _candidates(phase, order, shapes)
    measured = measure(phase, [load_checked(name) for name in usable], layers, buckets)
    if not measured.buckets:
        lines = "\n".join(f"{name}: {'; '.join(why)}" for name, why in measured.rejected.items())
        raise BackendError(f"no attention backend passes for {phase}\n{lines}", f"name one with --{phase}-attention")
    measured = Measured(measured.buckets, rejected | measured.rejected)
    cache.write(key, measured)
    choice = _as_choice(phase, measured, "auto: measured")
    lines = "\n".join(table_lines(choice))
    logger.info("%s attention was measured in %.1f s\n%s", phase, time.perf_counter() - started, lines)
    return choice


def _still_serves(phase: Phase, found: Measured, shapes: Sequence[Shape]) -> bool:
    names = {bucket.backend for bucket in found.buckets}
    return all(name in BACKENDS and not reasons_against(name, phase, shapes) for name in names)


def _as_choice(phase: Phase, measured: Measured, reason: str) -> AttentionChoice:
    wins = Counter(bucket.backend for bucket in measured.buckets)
    most = wins.most_common(1)[0][0]
    if all(len(bucket.times_ms) == 1 for bucket in measured.buckets):
        reason = "auto: the only one it may take here"
    return AttentionChoice(str(phase), most, reason, measured.rejected, measured.buckets)


def table_lines(choice: AttentionChoice) -> list[str]:
    """One line a measured size: the winner, the runner-up, and all times in ms; then why others serve none."""
    lines = []
    for bucket in choice.buckets:
        times = ", ".join(f"{name} {ms:.3f}" for name, ms in bucket.times_ms.items())
        runner_up = f"before {bucket.runner_up}" if bucket.runner_up else "alone"
        lines.append(f"  {bucket.size:<14} {bucket.backend} {runner_up} (ms: {times})")
    return lines + [f"  not {name}: {'; '.join(reasons)}" for name, reasons in choice.rejected.items()]


def _bind(choices: Mapping[Phase, AttentionChoice], shapes: Sequence[Shape], groups: Sequence[int]) -> Attention:
    backends, buckets = {}, {}
    for phase, choice in choices.items():
        bound = {name: [_bound(name, phase, shape) for shape in shapes] for name in choice.backends}
        backends[phase] = bound[choice.backend]
        if len(bound) > 1:
            buckets[phase] = {Bucket(b.num_seqs, b.q_len, b.kv_len): bound[b.backend] for b in choice.buckets}
    return Attention(backends, groups, buckets)


def _bound(name: str, phase: Phase, shape: Shape) -> AttentionBackend[Any]:
    backend = load_checked(name)
    try:
        return backend(phase, shape)
    except Exception as error:  # a library may raise anything when it is set up
        raise BackendError(
            f"{name} cannot be set up for {phase}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            f"use another --{phase}-attention",
        ) from error


def _hint(wanted: str, phase: Phase, shapes: Sequence[Shape]) -> str | None:
    """What mends a refusal: a page size that the wanted backend takes, what installs it, one that can serve."""
    mends = []
    for page_size in PAGE_SIZES:
        resized = [replace(shape, page_size=page_size) for shape in shapes]
        if wanted != "auto" and not reasons_against(wanted, phase, resized):
            mends.append(f"--page-size {page_size}")
            break
    others = (name for name in AUTO[phase] if name != wanted and not reasons_against(name, phase, shapes))
    mends += [f"--{phase}-attention {name}" for name in itertools.islice(others, 1)]
    hint = f"use {' or '.join(mends)}" if mends else None
    if wanted != "auto" and all("is not installed" in why for why in reasons_against(wanted, phase, shapes)):
        return ", or ".join(line for line in (install_line(wanted), hint) if line) or None
    return hint
