"""The kernels of sampling that programs of a row share: its peak, sums or a histogram, a list of what is in doubt.

Whatever programs add up are whole numbers, and what they list is looked at as a set: neither the order in which they
come nor how many there are changes a token. What only saves work may be rounded, as long as it errs to one side.
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
    MOST_PROGRAMS,
    P_FIRST,
    P_LAST,
    P_MASS,
    P_TARGET,
    STAGES,
    bins_of,
    load_cuts,
    log_weights,
    my_tokens,
    num_blocks,
    row_peak,
    share_of,
    weight_units,
)

ZEROS: tl.constexpr = tl.constexpr(256)
"""Bins that a program sets to 0 together."""
GROUPS: tl.constexpr = tl.constexpr(8)
"""Groups that a program tells its tokens apart by where one is too few and CHUNK are more than needed."""


@triton.jit
def _clear(
    counts: tl.tensor, masses: tl.tensor, marks: tl.tensor, number: tl.tensor, program: tl.tensor, programs: tl.tensor
) -> None:
    """Set this program's share of a row's histogram to 0, and the number of its listed tokens."""
    lane = tl.arange(0, ZEROS)
    for first in range(program * ZEROS, BINS, programs * ZEROS):
        tl.store(counts + number * BINS + first + lane, tl.zeros([ZEROS], tl.int32))
        tl.store(masses + number * BINS + first + lane, tl.zeros([ZEROS], tl.int64))
    if program == 0:
        tl.store(marks + number * 8 + LISTED, 0)


@triton.jit
def _at_least_so_many(
    largest: tl.tensor, peak: tl.tensor, top_k: tl.tensor, programs: tl.tensor, CHUNKS: tl.constexpr
) -> tl.tensor:
    """A logit that the k-th largest of the row is no less than, where all programs' answers are no less.

    largest  [chunks, CHUNK]: the largest logits of so many groups of a program's tokens

    Of k groups each has one token that is no less than the least of their largest; any k groups of the row will do.
    """
    of_column = tl.max(largest, 0)
    few = tl.min(tl.max(tl.reshape(of_column, [GROUPS, CHUNK // GROUPS]), 1), 0)
    columns = tl.min(of_column, 0)
    lanes = tl.min(tl.min(largest, 1), 0)
    found = tl.where(top_k <= programs * (CHUNKS * CHUNK), lanes, float("-inf"))
    found = tl.where(top_k <= programs * CHUNK, columns, found)
    found = tl.where(top_k <= programs * GROUPS, few, found)
    return tl.where(top_k <= programs, peak, found)


@triton.jit
def peak_kernel(
    logits: tl.tensor, parameters: tl.tensor, peaks: tl.tensor, best: tl.tensor, weights: tl.tensor,
    bounds: tl.tensor, counts: tl.tensor, masses: tl.tensor, marks: tl.tensor,
    row_stride: tl.tensor, size: tl.tensor, programs: tl.tensor, CHUNKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A program's largest logit and the lowest token that has it; grid (rows, programs).

    For rows that are cut also a weight, relative to that logit, that all its tokens have at least, and what
    `_at_least_so_many` gives. Shapes as `sampling.Workspace`.
    """
    wait_for_launch(PDL)
    number, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + number * row_stride
    largest = tl.full([CHUNKS, CHUNK], float("-inf"), tl.float32)
    _, where = my_tokens(0, program, programs, CHUNKS)
    for block in tl.range(0, num_blocks(size, programs, CHUNKS), num_stages=STAGES):
        _, token = my_tokens(block, program, programs, CHUNKS)
        value = tl.load(row + token, mask=token < size, other=float("-inf"))
        above = value > largest
        largest = tl.where(above, value, largest)
        where = tl.where(above, token, where)
    peak = tl.max(tl.max(largest, 1), 0)
    mine = number * programs + program
    tl.store(peaks + mine, peak)
    tl.store(best + mine, tl.min(tl.min(tl.where(largest == peak, where, 2147483647), 1), 0))
    temperature, _, top_k, _, cut_k, cut_p = load_cuts(parameters, number, size)
    if cut_k | cut_p:
        _clear(counts, masses, marks, number, program, programs)
        logs = log_weights(largest, peak, 1.4426950408889634 / temperature)
        tl.store(weights + mine, tl.sum(tl.sum(tl.exp2(logs), 1), 0))
        tl.store(bounds + mine, _at_least_so_many(largest, peak, top_k, programs, CHUNKS))


@triton.jit
def _lowest_counted(
    peaks: tl.tensor, weights: tl.tensor, bounds: tl.tensor, number: tl.tensor, programs: tl.tensor, size: tl.tensor,
    peak: tl.tensor, rate: tl.tensor, min_p: tl.tensor, top_p: tl.tensor, cut_k: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """A log2 weight below which no cut lies, so that less needs to go into the histogram.

    Of top-k: see `_at_least_so_many`. Of top-p alone: tokens that weigh less than (1 - top_p) / size of all weigh less
    than 1 - top_p together. All is at least what programs found, or 1 where min_p may have dropped that; a hundredth
    is left for rounding.
    """
    program = tl.arange(0, MOST_PROGRAMS)
    at, real = number * programs + program, program < programs
    if cut_k:
        bound = tl.min(tl.load(bounds + at, mask=real, other=float("inf")), 0)
        lowest = log_weights(bound, peak, rate)
    else:
        logs = log_weights(tl.load(peaks + at, mask=real, other=float("-inf")), peak, rate)
        found = tl.sum(tl.load(weights + at, mask=real, other=0.0) * tl.exp2(logs), 0)
        whole = tl.where(min_p > 0.0, 1.0, tl.maximum(found, 1.0))
        lowest = tl.log2(whole * (0.99 * (1.0 - top_p)).to(tl.float32) / size)
    return lowest


@triton.jit
def _fill_histogram(
    row: tl.tensor, size: tl.tensor, program: tl.tensor, programs: tl.tensor, peak: tl.tensor, rate: tl.tensor,
    min_p: tl.tensor, lowest: tl.tensor, cut_k: tl.tensor, cut_p: tl.tensor, counts: tl.tensor, masses: tl.tensor,
    CHUNKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Count a program's tokens from `lowest` on, and add up their weight, bin by bin; returns the weight of all."""
    total = tl.zeros([CHUNKS, CHUNK], tl.int64)
    for block in tl.range(0, num_blocks(size, programs, CHUNKS), num_stages=STAGES):
        _, token = my_tokens(block, program, programs, CHUNKS)
        value = tl.load(row + token, mask=token < size, other=float("-inf"))
        logs = log_weights(value, peak, rate)
        units = weight_units(logs, min_p)
        total += units
        counted = (units > 0) & (logs >= lowest)
        bins = bins_of(logs, counted)
        if cut_k:
            tl.atomic_add(counts + bins, 1, mask=counted, sem="relaxed")
        if cut_p:
            tl.atomic_add(masses + bins, units, mask=counted, sem="relaxed")
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def weigh_kernel(
    logits: tl.tensor, parameters: tl.tensor, peaks: tl.tensor, best: tl.tensor, weights: tl.tensor,
    bounds: tl.tensor, counts: tl.tensor, masses: tl.tensor, totals: tl.tensor, sums: tl.tensor, out: tl.tensor,
    row_stride: tl.tensor, size: tl.tensor, programs: tl.tensor, CHUNKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Each row's most likely token; of rows that are cut the histogram, of others each chunk's sum of weights.

    grid (rows, programs); shapes as `sampling.Workspace`
    """
    wait_for_launch(PDL)
    number, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + number * row_stride
    temperature, min_p, _, top_p, cut_k, cut_p = load_cuts(parameters, number, size)
    if program == 0:
        others = tl.arange(0, MOST_PROGRAMS)
        at, real = number * programs + others, others < programs
        theirs = tl.load(peaks + at, mask=real, other=float("-inf"))
        tokens = tl.load(best + at, mask=real, other=2147483647)
        tl.store(out + number, tl.min(tl.where(theirs == tl.max(theirs, 0), tokens, 2147483647), 0).to(tl.int64))
    if temperature == 0.0:
        return
    peak, rate = row_peak(peaks, number, programs), 1.4426950408889634 / temperature
    if cut_k | cut_p:
        lowest = _lowest_counted(peaks, weights, bounds, number, programs, size, peak, rate, min_p, top_p, cut_k)
        total = _fill_histogram(
            row, size, program, programs, peak, rate, min_p, lowest, cut_k, cut_p,
            counts + number * BINS, masses + number * BINS, CHUNKS,
        )  # fmt: skip
        tl.store(totals + number * programs + program, total)
    else:
        row_chunks = tl.cdiv(size, CHUNK)
        for block in tl.range(0, num_blocks(size, programs, CHUNKS), num_stages=STAGES):
            chunks, token = my_tokens(block, program, programs, CHUNKS)
            value = tl.load(row + token, mask=token < size, other=float("-inf"))
            units = weight_units(log_weights(value, peak, rate), min_p)
            tl.store(sums + number * row_chunks + chunks, tl.sum(units, 1), mask=chunks < row_chunks)


@triton.jit
def _cut_bin(amounts: tl.tensor, target: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The last bin that is not empty above which there is less than `target`, and how much that is; amounts [BINS]."""
    number = tl.arange(0, BINS)
    before = tl.cumsum(amounts, 0) - amounts
    last = tl.max(tl.where((amounts > 0) & (before < target), number, 0), 0)
    return last, tl.sum(tl.where(number == last, before, 0), 0)


@triton.jit
def _find_bins(
    counts: tl.tensor, masses: tl.tensor, totals: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, cut_k: tl.tensor,
    cut_p: tl.tensor, programs: tl.tensor,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Where a row is cut, from its histogram; the marks of that name. A bin of -1 where that does not cut."""
    number = tl.arange(0, BINS)
    zero = tl.sum(tl.zeros([BINS], tl.int64), 0)
    k_bin, k_count, k_mass = -1, zero, zero
    p_first, p_last, p_mass, target = -1, -1, zero, zero
    if cut_k:
        k_bin, k_count = _cut_bin(tl.load(counts + number).to(tl.int64), top_k.to(tl.int64))
    if cut_p:
        amounts = tl.load(masses + number)
        if cut_k:
            # What top-k keeps is known but for the tokens of its bin: top-p cuts somewhere between.
            k_mass = tl.sum(tl.where(number < k_bin, amounts, 0), 0)
            most = tl.sum(tl.where(number <= k_bin, amounts, 0), 0)
            p_last, _ = _cut_bin(amounts, share_of(most, top_p))
            p_first, p_mass = _cut_bin(amounts, share_of(k_mass, top_p))
        else:
            program = tl.arange(0, MOST_PROGRAMS)
            target = share_of(tl.sum(tl.load(totals + program, mask=program < programs, other=0), 0), top_p)
            p_first, p_mass = _cut_bin(amounts, target)
            p_last = p_first
    return k_bin, k_count, k_mass, p_first, p_last, p_mass, target


@triton.jit
def _list_tokens(
    listed: tl.tensor, logs: tl.tensor, token: tl.tensor, values: tl.tensor, ids: tl.tensor, count: tl.tensor,
    room: tl.tensor,
) -> None:  # fmt: skip
    """Append what is `listed` of [chunks, CHUNK] to a row's list, as far as there is room."""
    ones = listed.to(tl.int32)
    of_chunk = tl.sum(ones, 1)
    new = tl.sum(of_chunk, 0)
    if new > 0:
        first = tl.atomic_add(count, new.to(tl.int64), sem="relaxed").to(tl.int32)
        before = (tl.cumsum(of_chunk, 0) - of_chunk)[:, None] + tl.cumsum(ones, 1) - ones
        at = first + before
        tl.store(values + at, logs, mask=listed & (at < room))
        tl.store(ids + at, token, mask=listed & (at < room))


@triton.jit
def list_kernel(
    logits: tl.tensor, parameters: tl.tensor, peaks: tl.tensor, counts: tl.tensor, masses: tl.tensor,
    totals: tl.tensor, marks: tl.tensor, sums: tl.tensor, values: tl.tensor, ids: tl.tensor,
    row_stride: tl.tensor, size: tl.tensor, programs: tl.tensor, room: tl.tensor,
    CHUNKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Of rows that are cut: each chunk's sum of what is kept for certain, and a list of what may be.

    grid (rows, programs); shapes as `sampling.Workspace`
    """
    wait_for_launch(PDL)
    number, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, min_p, top_k, top_p, cut_k, cut_p = load_cuts(parameters, number, size)
    if cut_k | cut_p:
        k_bin, k_count, k_mass, p_first, p_last, p_mass, target = _find_bins(
            counts + number * BINS, masses + number * BINS, totals + number * programs,
            top_k, top_p, cut_k, cut_p, programs,
        )  # fmt: skip
        mark = marks + number * 8
        if program == 0:
            tl.store(mark + K_BIN, k_bin)
            tl.store(mark + K_COUNT, k_count)
            tl.store(mark + K_MASS, k_mass)
            tl.store(mark + P_FIRST, p_first)
            tl.store(mark + P_LAST, p_last)
            tl.store(mark + P_MASS, p_mass)
            tl.store(mark + P_TARGET, target)
        row, row_chunks = logits + number * row_stride, tl.cdiv(size, CHUNK)
        peak, rate = row_peak(peaks, number, programs), 1.4426950408889634 / temperature
        certain = tl.where(cut_p, p_first, k_bin)
        for block in tl.range(0, num_blocks(size, programs, CHUNKS), num_stages=STAGES):
            chunks, token = my_tokens(block, program, programs, CHUNKS)
            value = tl.load(row + token, mask=token < size, other=float("-inf"))
            logs = log_weights(value, peak, rate)
            units = weight_units(logs, min_p)
            bins = bins_of(logs, units > 0)
            kept = tl.sum(tl.where(bins < certain, units, 0), 1)
            tl.store(sums + number * row_chunks + chunks, kept, mask=chunks < row_chunks)
            listed = ((bins >= p_first) & (bins <= p_last)) | (bins == k_bin)
            _list_tokens(listed, logs, token, values + number * room, ids + number * room, mark + LISTED, room)
