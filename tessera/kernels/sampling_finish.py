"""The last kernel of sampling, one program a row: where exactly the row is cut, and which token is drawn.

The bin in which a row is cut is known, and its tokens stand in a list. The least value that is kept is searched for
among them: three pivots a pass, each with the count or the weight above it, until one value is left between pivots.
So it is found exactly, as by sorting. Where the list had no room (150,000 equal logits, say) passes are over the row.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.dependent import wait_for_launch
from tessera.kernels.sampling_rows import (
    BINS,
    CHUNK,
    K_BIN,
    K_COUNT,
    K_MASS,
    LISTED,
    P_FIRST,
    P_LAST,
    P_MASS,
    P_TARGET,
    WEIGHT_BITS,
    bins_of,
    load_cuts,
    log_weights,
    row_peak,
    share_of,
    weight_units,
)


@triton.jit
def _load_logs(
    source: tl.tensor, first: tl.tensor, count: tl.tensor, peak: tl.tensor, rate: tl.tensor,
    LIST: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BLOCK] log2 weights from the list, or of the logits of the row, from number `first` on; -inf past the end."""
    at = first + tl.arange(0, BLOCK)
    logs = tl.load(source + at, mask=at < count, other=float("-inf"))
    if not LIST:
        logs = log_weights(logs, peak, rate)
    return logs


@triton.jit
def _pass(
    source: tl.tensor, count: tl.tensor, peak: tl.tensor, rate: tl.tensor, min_p: tl.tensor, first_bin: tl.tensor,
    last_bin: tl.tensor, low: tl.tensor, high: tl.tensor, pivot_1: tl.tensor, pivot_2: tl.tensor, pivot_3: tl.tensor,
    MASS: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """One look at what lies in some bins: the weight, or how many tokens, above each pivot.

    returns  above_1, above_2, above_3, and the least and the largest value in (low, high]
    """
    above_1 = tl.zeros([BLOCK], tl.int64)
    above_2 = tl.zeros([BLOCK], tl.int64)
    above_3 = tl.zeros([BLOCK], tl.int64)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, count, BLOCK):
        logs = _load_logs(source, first, count, peak, rate, LIST, BLOCK)
        units = weight_units(logs, min_p)
        bins = bins_of(logs, units > 0)
        logs = tl.where((bins >= first_bin) & (bins <= last_bin), logs, float("-inf"))
        amount = units
        if not MASS:
            amount = tl.full([BLOCK], 1, tl.int64)
        above_1 += tl.where(logs > pivot_1, amount, 0)
        above_2 += tl.where(logs > pivot_2, amount, 0)
        above_3 += tl.where(logs > pivot_3, amount, 0)
        least = tl.minimum(least, tl.where(logs > low, logs, float("inf")))
        most = tl.maximum(most, tl.where(logs <= high, logs, float("-inf")))
    return tl.sum(above_1, 0), tl.sum(above_2, 0), tl.sum(above_3, 0), tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _least_kept(
    source: tl.tensor, count: tl.tensor, peak: tl.tensor, rate: tl.tensor, min_p: tl.tensor, first_bin: tl.tensor,
    last_bin: tl.tensor, above: tl.tensor, target: tl.tensor,
    MASS: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least log2 weight in some bins above which there is less than `target`: weight where MASS, else tokens.

    `above` is how much lies above the first of the bins, less than `target`. Too much lies above `low` and too little
    above `high`, so the value is in (low, high].
    """
    width: tl.constexpr = WEIGHT_BITS / BINS
    low, high = -(last_bin + 2).to(tl.float32) * width, -tl.maximum(first_bin - 1, 0).to(tl.float32) * width
    least, most = low, high
    while least < most:
        # Middles, not steps from low: a quarter of few denormals is 0, and the search would never end.
        pivot_2 = (low + high) * 0.5
        pivot_1, pivot_3 = (low + pivot_2) * 0.5, (pivot_2 + high) * 0.5
        above_1, above_2, above_3, least, most = _pass(
            source, count, peak, rate, min_p, first_bin, last_bin, low, high, pivot_1, pivot_2, pivot_3,
            MASS, LIST, BLOCK,
        )  # fmt: skip
        few_1, few_2, few_3 = above + above_1 < target, above + above_2 < target, above + above_3 < target
        high = tl.where(few_1, pivot_1, tl.where(few_2, pivot_2, tl.where(few_3, pivot_3, high)))
        low = tl.where(few_1, low, tl.where(few_2, pivot_1, tl.where(few_3, pivot_2, pivot_3)))
    return most


@triton.jit
def _mass(
    source: tl.tensor, count: tl.tensor, peak: tl.tensor, rate: tl.tensor, min_p: tl.tensor, of_bin: tl.tensor,
    floor: tl.tensor, LIST: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The weight of a bin's tokens from `floor` on."""
    total = tl.zeros([BLOCK], tl.int64)
    for first in range(0, count, BLOCK):
        logs = _load_logs(source, first, count, peak, rate, LIST, BLOCK)
        units = weight_units(logs, min_p)
        total += tl.where((bins_of(logs, units > 0) == of_bin) & (logs >= floor), units, 0)
    return tl.sum(total, 0)


@triton.jit
def _cut(
    source: tl.tensor, ids: tl.tensor, count: tl.tensor, mark: tl.tensor, sums: tl.tensor, peak: tl.tensor,
    rate: tl.tensor, min_p: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, cut_k: tl.tensor, cut_p: tl.tensor,
    LIST: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least log2 weight that is kept; what is kept of the bins in doubt is added to the sums of its chunks.

    source, count  the list, whose tokens are `ids`, or the logits of the row
    """
    floor = rate * 0.0 - 1.0e30
    k_bin = tl.load(mark + K_BIN).to(tl.int32)
    p_first, p_last = tl.load(mark + P_FIRST).to(tl.int32), tl.load(mark + P_LAST).to(tl.int32)
    if cut_k:
        above = tl.load(mark + K_COUNT)
        floor = _least_kept(
            source, count, peak, rate, min_p, k_bin, k_bin, above, top_k.to(tl.int64), False, LIST, BLOCK
        )  # fmt: skip
    if cut_p:
        target = tl.load(mark + P_TARGET)
        if cut_k:
            kept = _mass(source, count, peak, rate, min_p, k_bin, floor, LIST, BLOCK)
            target = share_of(tl.load(mark + K_MASS) + kept, top_p)
        above = tl.load(mark + P_MASS)
        least = _least_kept(source, count, peak, rate, min_p, p_first, p_last, above, target, True, LIST, BLOCK)
        floor = tl.maximum(floor, least)
    certain = tl.where(cut_p, p_first, k_bin)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        logs = _load_logs(source, first, count, peak, rate, LIST, BLOCK)
        units = weight_units(logs, min_p)
        kept = (logs >= floor) & (units > 0) & (bins_of(logs, units > 0) >= certain)
        token = at
        if LIST:
            token = tl.load(ids + at, mask=at < count, other=0)
        tl.atomic_add(sums + token // CHUNK, units, mask=kept, sem="relaxed")
    tl.debug_barrier()  # every thread's share is added before the sums are read
    return floor


@triton.jit
def _draw(
    row: tl.tensor, size: tl.tensor, peak: tl.tensor, rate: tl.tensor, floor: tl.tensor, min_p: tl.tensor,
    draw: tl.tensor, sums: tl.tensor, SUMS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The first token up to which more than a share `draw` / 2^32 of all weight lies; -1 where there is no weight."""
    chunk = tl.arange(0, SUMS)
    row_chunks = tl.cdiv(size, CHUNK)
    # .cg: read from L2, where sums are added to; L1 may hold what stood there before.
    weights = tl.load(sums + chunk, mask=chunk < row_chunks, other=0, cache_modifier=".cg")
    total = tl.sum(weights, 0)
    # floor(total * draw / 2^32), in two parts because the product has more than 64 bits.
    below = (total & 0xFFFFFFFF).to(tl.uint64) * draw.to(tl.uint64)
    target = (total >> 32) * draw + (below >> 32).to(tl.int64)
    through = tl.cumsum(weights, 0)
    chosen = tl.minimum(tl.sum((through <= target).to(tl.int32), 0), row_chunks - 1)
    before = tl.sum(tl.where(chunk < chosen, weights, 0), 0)
    token = chosen * CHUNK + tl.arange(0, CHUNK)
    logs = log_weights(tl.load(row + token, mask=token < size, other=float("-inf")), peak, rate)
    units = tl.where(logs >= floor, weight_units(logs, min_p), 0)
    passed = tl.sum((before + tl.cumsum(units, 0) <= target).to(tl.int32), 0)
    return tl.where(total > 0, chosen * CHUNK + passed, -1)


@triton.jit
def draw_kernel(
    logits: tl.tensor, parameters: tl.tensor, peaks: tl.tensor, marks: tl.tensor, sums: tl.tensor, values: tl.tensor,
    ids: tl.tensor, out: tl.tensor, row_stride: tl.tensor, size: tl.tensor, programs: tl.tensor, room: tl.tensor,
    BLOCK: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Each row's token, where it is not greedy; a row without weight keeps the most likely one. grid (rows)

    Shapes as `sampling.Workspace`; SUMS is no less than the chunks of a row.
    """
    wait_for_launch(PDL)
    number = tl.program_id(0).to(tl.int64)
    temperature, min_p, top_k, top_p, cut_k, cut_p = load_cuts(parameters, number, size)
    if temperature == 0.0:
        return
    draw = (tl.load(parameters + number * 5 + 4) * 4294967296.0).to(tl.int64)
    row, sum_of = logits + number * row_stride, sums + number * tl.cdiv(size, CHUNK)
    peak, rate = row_peak(peaks, number, programs), 1.4426950408889634 / temperature
    floor = rate * 0.0 - 1.0e30
    if cut_k | cut_p:
        mark, value, token_id = marks + number * 8, values + number * room, ids + number * room
        listed = tl.load(mark + LISTED).to(tl.int32)
        if listed <= room:
            floor = _cut(
                value, token_id, listed, mark, sum_of, peak, rate, min_p, top_k, top_p, cut_k, cut_p, True, BLOCK
            )  # fmt: skip
        else:
            floor = _cut(row, token_id, size, mark, sum_of, peak, rate, min_p, top_k, top_p, cut_k, cut_p, False, BLOCK)
    token = _draw(row, size, peak, rate, floor, min_p, draw, sum_of, SUMS)
    if token >= 0:
        tl.store(out + number, token.to(tl.int64))
