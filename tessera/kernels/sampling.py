"""Sampling without sorting the vocabulary: one launch, one program a row, each with its own parameters.

Where top-k or top-p truncates, the least logit that is kept is searched for: three pivots a pass over the row, each
with the count or the mass above it, until one value is left between the pivots. So it is found exactly, as by
sorting. FlashInfer's sampling (arXiv 2501.01005) searches by pivots as well, but draws anew after each; here one
given number decides, for the token is found by inverting the cumulative distribution in the vocabulary's order.
Its sums are whole numbers of 2^-40, so no order of adding changes them and a row has the same token in any batch.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.launch import Launch, Launcher

BLOCK = 4096
"""Logits that a program looks at together."""
STAGES: tl.constexpr = tl.constexpr(4)
"""Blocks on their way at a time."""
PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "draw")
"""Columns of the parameters of rows."""


@triton.jit
def _log_weights(
    row: tl.tensor, first: tl.tensor, size: tl.tensor, peak: tl.tensor, rate: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """[BLOCK] log2 of the weights of tokens from `first` on, 0 for the most likely; -inf for NaN and past the end."""
    token = first + tl.arange(0, BLOCK)
    logits = tl.load(row + token, mask=token < size, other=float("-inf"))
    # Compared, because the difference of two infinities would be NaN.
    logs = tl.where(logits == peak, 0.0, (logits - peak) * rate)
    return tl.where(logs == logs, logs, float("-inf"))


@triton.jit
def _peak(row: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The largest logit of a row and the lowest token id that has it; NaN counts as -inf."""
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        token = first + lane
        logits = tl.load(row + token, mask=token < size, other=float("-inf"))
        above = logits > largest
        largest = tl.where(above, logits, largest)
        where = tl.where(above, token, where)
    peak = tl.max(largest, 0)
    return peak, tl.min(tl.where(largest == peak, where, 2147483647), 0)


@triton.jit
def _pass(
    row: tl.tensor, size: tl.tensor, peak: tl.tensor, rate: tl.tensor, floor: tl.tensor, min_p: tl.tensor,
    low: tl.tensor, high: tl.tensor, pivot_1: tl.tensor, pivot_2: tl.tensor, pivot_3: tl.tensor,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """One look at a row, of mass or of tokens: how much lies above each pivot, and how much is kept so far.

    returns  above_1, above_2, above_3, kept, and the least and the largest value in (low, high]
    """
    above_1 = tl.zeros([BLOCK], tl.float32)
    above_2 = tl.zeros([BLOCK], tl.float32)
    above_3 = tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        logs = _log_weights(row, first, size, peak, rate, BLOCK)
        amount = tl.full([BLOCK], 1.0, tl.float32)
        if MASS:
            amount = tl.exp2(logs)
            kept += tl.where((logs >= floor) & (amount >= min_p), amount, 0.0)
        above_1 += tl.where(logs > pivot_1, amount, 0.0)
        above_2 += tl.where(logs > pivot_2, amount, 0.0)
        above_3 += tl.where(logs > pivot_3, amount, 0.0)
        least = tl.minimum(least, tl.where(logs > low, logs, float("inf")))
        most = tl.maximum(most, tl.where(logs <= high, logs, float("-inf")))
    sums = tl.sum(above_1, 0), tl.sum(above_2, 0), tl.sum(above_3, 0), tl.sum(kept, 0)
    return sums[0], sums[1], sums[2], sums[3], tl.min(least, 0), tl.max(most, 0)


@triton.jit
def _least_kept(
    row: tl.tensor, size: tl.tensor, peak: tl.tensor, rate: tl.tensor, floor: tl.tensor, min_p: tl.tensor,
    most_above: tl.tensor, MASS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The least log2 weight of a row above which there are fewer than `most_above` tokens.

    Where MASS: above which there is less than that share of the mass of what `floor` and `min_p` keep. Too much lies
    above `low` and too little above `high`, so the value is in (low, high]. What weighs less than 2^-45 cannot be
    drawn and is not told apart. The first pivots stand where distributions of language models are cut.
    """
    low, high = most_above * 0.0 - 45.0, most_above * 0.0
    pivot_1, pivot_2, pivot_3 = low + 29.0, low + 36.0, low + 41.0
    least, most = low, high
    while least < most:
        above_1, above_2, above_3, kept, least, most = _pass(
            row, size, peak, rate, floor, min_p, low, high, pivot_1, pivot_2, pivot_3, MASS, BLOCK
        )  # fmt: skip
        target = most_above * kept if MASS else most_above
        few_1, few_2, few_3 = above_1 < target, above_2 < target, above_3 < target
        high = tl.where(few_1, pivot_1, tl.where(few_2, pivot_2, tl.where(few_3, pivot_3, high)))
        low = tl.where(few_1, low, tl.where(few_2, pivot_1, tl.where(few_3, pivot_2, pivot_3)))
        # Middles, not steps from low: a quarter of few denormals is 0, and the search would never end.
        pivot_2 = (low + high) * 0.5
        pivot_1, pivot_3 = (low + pivot_2) * 0.5, (pivot_2 + high) * 0.5
    return most


@triton.jit
def _units(logs: tl.tensor, floor: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """Weights as whole numbers of 2^-40, int64; 0 for what is not kept. 2^22 of them can be added up."""
    weights = tl.exp2(logs)
    return (tl.where((logs >= floor) & (weights >= min_p), weights, 0.0) * 1099511627776.0).to(tl.int64)


@triton.jit
def _draw(
    row: tl.tensor, size: tl.tensor, peak: tl.tensor, rate: tl.tensor, floor: tl.tensor, min_p: tl.tensor,
    draw: tl.tensor, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The first token up to which more than a share `draw` / 2^32 of all weight lies; -1 where there is no weight."""
    block = tl.arange(0, BLOCKS)
    sums = tl.zeros([BLOCKS], tl.int64)
    for first in tl.range(0, size, BLOCK, num_stages=STAGES):
        units = _units(_log_weights(row, first, size, peak, rate, BLOCK), floor, min_p)
        sums = tl.where(block == first // BLOCK, tl.sum(units, 0), sums)
    total = tl.sum(sums, 0)
    # floor(total * draw / 2^32), in two parts because the product has more than 64 bits.
    below = (total & 0xFFFFFFFF).to(tl.uint64) * draw.to(tl.uint64)
    target = (total >> 32) * draw + (below >> 32).to(tl.int64)
    through = tl.cumsum(sums, 0)
    chosen = tl.minimum(tl.sum((through <= target).to(tl.int32), 0), (size - 1) // BLOCK)
    before = tl.sum(tl.where(block < chosen, sums, 0), 0)
    units = _units(_log_weights(row, chosen * BLOCK, size, peak, rate, BLOCK), floor, min_p)
    token = chosen * BLOCK + tl.sum((before + tl.cumsum(units, 0) <= target).to(tl.int32), 0)
    return tl.where(total > 0, token, -1)


@triton.jit
def sample_kernel(
    logits: tl.tensor, parameters: tl.tensor, out: tl.tensor, row_stride: tl.tensor, size: tl.tensor,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row; grid (rows). Shapes as `sample`."""
    wait_for_launch(PDL)
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    temperature = tl.load(parameters + number * 5).to(tl.float32)
    peak, best = _peak(row, size, BLOCK)
    if temperature == 0.0:
        tl.store(out + number, best.to(tl.int64))
        return
    top_k = tl.load(parameters + number * 5 + 1).to(tl.float32)
    top_p = tl.load(parameters + number * 5 + 2).to(tl.float32)
    min_p = tl.load(parameters + number * 5 + 3).to(tl.float32)
    draw = (tl.load(parameters + number * 5 + 4) * 4294967296.0).to(tl.int64)
    rate = 1.4426950408889634 / temperature
    peak = tl.maximum(peak, -3.4028234663852886e38)  # float32's lowest: a row of nothing but -inf has no weight
    floor = temperature * 0.0 - 1.0e30
    if (top_k > 0.0) & (top_k < size):
        floor = _least_kept(row, size, peak, rate, floor, min_p, top_k, False, BLOCK)
    if top_p < 1.0:
        floor = tl.maximum(floor, _least_kept(row, size, peak, rate, floor, min_p, top_p, True, BLOCK))
    token = _draw(row, size, peak, rate, floor, min_p, draw, BLOCK, BLOCKS)
    tl.store(out + number, tl.where(token < 0, best, token).to(tl.int64))


_launch_sample = Launcher(sample_kernel)


def sample(logits: Tensor, parameters: Tensor, *, pdl: bool | None = None) -> Tensor:
    """One token a row, decided by that row's logits and parameters alone; of equal largest logits the lowest id.

    logits      [rows, vocab] float32, rows contiguous; left as they are. NaN counts as -inf
    parameters  [rows, 5] float64, columns as PARAMETERS: temperature, 0 for the most likely token; top_k, 0 for all;
                top_p, 1 for all; min_p, 0 for all; draw, in [0, 1) and a multiple of 2^-32
    pdl         see `dependent.py`; None: where `pdl_on`
    returns     [rows] int64

    Tokens equal to the k-th are all kept. Weights below 2^-40 of the largest count as 0.
    """
    rows, size = logits.shape
    out = parameters.new_empty(rows, dtype=torch.int64)
    if rows:
        launch = _compiled(size, pdl_on(logits.device) if pdl is None else pdl)
        launch((rows,), logits, parameters, out, logits.stride(0), size)
    return out


@cache
def _compiled(size: int, pdl: bool) -> Launch:
    block = min(BLOCK, triton.next_power_of_2(size))
    blocks, num_warps = triton.next_power_of_2(triton.cdiv(size, block)), max(1, min(16, block // 256))
    return _launch_sample.fixed(
        BLOCK=block, BLOCKS=blocks, num_warps=num_warps, enable_fp_fusion=False, **launch_constants(pdl)
    )
