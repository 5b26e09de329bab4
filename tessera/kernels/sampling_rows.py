"""What the kernels of sampling share: a row's parameters, its weights as whole numbers, and who works on which of them.

A row is cut into chunks; its programs take them in turn, so that each sees some of every part of the vocabulary.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(128)
"""Tokens of a chunk: what one warp reads at a time, and what the last kernel draws from."""
BINS: tl.constexpr = tl.constexpr(2048)
"""Bins of the histogram of log2 weights, over the WEIGHT_BITS in which a weight is not 0."""
WEIGHT_BITS: tl.constexpr = tl.constexpr(40)
"""A weight is a whole number of 2^-40 of the largest, so that 2^22 of them can be added up in 63 bits."""
STAGES: tl.constexpr = tl.constexpr(4)
"""Blocks on their way at a time."""
MOST_PROGRAMS: tl.constexpr = tl.constexpr(128)
"""Programs that a row can be cut among."""
K_BIN: tl.constexpr = tl.constexpr(0)
"""Columns of a row's marks, [8] int64, as `list_kernel` leaves them: the bin in which top-k cuts."""
K_COUNT: tl.constexpr = tl.constexpr(1)
"""Tokens above that bin."""
K_MASS: tl.constexpr = tl.constexpr(2)
"""Their weight."""
P_FIRST: tl.constexpr = tl.constexpr(3)
"""The first of the bins, counted from the most likely, in which top-p may cut."""
P_LAST: tl.constexpr = tl.constexpr(4)
"""The last of them."""
P_MASS: tl.constexpr = tl.constexpr(5)
"""Weight above the first."""
P_TARGET: tl.constexpr = tl.constexpr(6)
"""Weight that top-p keeps at least; without top-k alone, with it is known once that has cut."""
LISTED: tl.constexpr = tl.constexpr(7)
"""Tokens in those bins, of which as many as there is room for stand in the list."""


@triton.jit
def log_weights(logits: tl.tensor, peak: tl.tensor, rate: tl.tensor) -> tl.tensor:
    """Log2 of the weights of logits, 0 for the most likely; -inf for NaN."""
    # Compared, because the difference of two infinities would be NaN.
    logs = tl.where(logits == peak, 0.0, (logits - peak) * rate)
    return tl.where(logs == logs, logs, float("-inf"))


@triton.jit
def weight_units(logs: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """Weights as whole numbers of 2^-40, int64; 0 below `min_p`."""
    weights = tl.exp2(logs)
    return (tl.where(weights >= min_p, weights, 0.0) * 1099511627776.0).to(tl.int64)


@triton.jit
def bins_of(logs: tl.tensor, counted: tl.tensor) -> tl.tensor:
    """The bins of log2 weights, 0 for the most likely; of what is not `counted`, none that there is."""
    per_bit: tl.constexpr = BINS / WEIGHT_BITS
    numbers = tl.minimum((tl.where(counted, logs, 0.0) * -per_bit).to(tl.int32), BINS - 1)
    return tl.where(counted, numbers, 1 << 30)


@triton.jit
def my_tokens(
    number: tl.tensor, program: tl.tensor, programs: tl.tensor, CHUNKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The chunks [CHUNKS] of a program's block of that number, and their tokens [CHUNKS, CHUNK]."""
    chunks = (number * CHUNKS + tl.arange(0, CHUNKS)) * programs + program
    return chunks, chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def num_blocks(size: tl.tensor, programs: tl.tensor, CHUNKS: tl.constexpr) -> tl.tensor:
    """Blocks of each program of a row of `size` logits."""
    return tl.cdiv(size, programs * (CHUNKS * CHUNK))


@triton.jit
def load_cuts(parameters: tl.tensor, number: tl.tensor, size: tl.tensor) -> tuple[tl.tensor, ...]:
    """How a row is sampled: temperature and min_p float32, top_k, top_p float64, whether either of these cuts."""
    temperature = tl.load(parameters + number * 5).to(tl.float32)
    top_k = tl.load(parameters + number * 5 + 1)
    top_p = tl.load(parameters + number * 5 + 2)
    min_p = tl.load(parameters + number * 5 + 3).to(tl.float32)
    random = temperature != 0.0
    return temperature, min_p, top_k, top_p, random & (top_k > 0.0) & (top_k < size), random & (top_p < 1.0)


@triton.jit
def row_peak(peaks: tl.tensor, number: tl.tensor, programs: tl.tensor) -> tl.tensor:
    """The largest logit of a row, of those that its programs found; float32's lowest where all are -inf."""
    program = tl.arange(0, MOST_PROGRAMS)
    own = tl.load(peaks + number * programs + program, mask=program < programs, other=float("-inf"))
    return tl.maximum(tl.max(own, 0), -3.4028234663852886e38)


@triton.jit
def share_of(whole: tl.tensor, share: tl.tensor) -> tl.tensor:
    """The least whole number that is no less than `share` of a whole one, int64, and at least 1."""
    product = whole.to(tl.float64) * share
    least = product.to(tl.int64)
    return tl.maximum(least + (least.to(tl.float64) < product).to(tl.int64), 1)
