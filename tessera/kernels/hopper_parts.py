"""Pieces of `hopper_attend.py` that know of the two parts of a head that is no power of two, see `packed.py`.

A part that there is not (TAIL 0) stands for the main part, so that all that is passed on has a type.
"""

# ruff: noqa: N803 -- what is compiled in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from tessera.kernels.hopper_softmax import as_operand, scale_rows
from tessera.kernels.hopper_tiles import load_rows, store_rows


@gluon.jit
def load_queries(
    q: gl.tensor, tile: gl.tuple, q_stride: gl.tensor, Q_HEAD_STRIDE: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr, HEAD_DIM: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Both parts of the queries of a tile (key head, first row, where its sequence's queries begin, their number, ..),
    on their way.
    """
    main = load_rows(
        q, tile[0], tile[1], tile[2], tile[3], q_stride, Q_HEAD_STRIDE, GROUP, BLOCK_M, 0, MAIN, HEAD_DIM
    )  # fmt: skip
    tail = main
    if TAIL > 0:
        tail = load_rows(
            q, tile[0], tile[1], tile[2], tile[3], q_stride, Q_HEAD_STRIDE, GROUP, BLOCK_M, MAIN, TAIL, HEAD_DIM
        )  # fmt: skip
    return main, tail


@gluon.jit
def keep_queries(queries: gl.tuple, buffer: gl.tensor, main: gl.tensor, tail: gl.tensor, TAIL: gl.constexpr) -> None:
    """Store loaded queries where products will read them."""
    queries[0].index(buffer).store(main)
    if TAIL > 0:
        queries[1].index(buffer).store(tail)
    fence_async_shared()


@gluon.jit
def begin_sums(BLOCK_M: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr) -> tuple[gl.tensor, ...]:
    """Nothing summed up yet, in both parts; the main part twice where there is no tail."""
    sums = gl.zeros([BLOCK_M, MAIN], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16]))
    tails = sums
    if TAIL > 0:
        tails = gl.zeros([BLOCK_M, TAIL], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 16]))
    return sums, tails


@gluon.jit
def multiply_values(
    weights: gl.tensor, values: gl.tuple, stage: gl.tensor, sums: gl.tensor, tails: gl.tensor, TAIL: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Sums with one more tile of weighted values, on their way."""
    pending = warpgroup_mma(weights, values[0].index(stage), sums, is_async=True)
    pending_tails = pending
    if TAIL > 0:
        pending_tails = warpgroup_mma(as_operand(weights, TAIL), values[1].index(stage), tails, is_async=True)
    return pending, pending_tails


@gluon.jit
def await_sums(
    pending: gl.tensor, pending_tails: gl.tensor, LATER: gl.constexpr, TAIL: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Sums that have come, with so many products begun after them still on their way."""
    if TAIL > 0:
        sums, tails = warpgroup_mma_wait(LATER, [pending, pending_tails])
    else:
        sums = warpgroup_mma_wait(LATER, [pending])
        tails = sums
    return sums, tails


@gluon.jit
def store_answers(
    out: gl.tensor, sums: gl.tensor, tails: gl.tensor, total: gl.tensor, row: gl.tensor, kv_head: gl.tensor,
    begin: gl.tensor, q_len: gl.tensor, out_stride: gl.tensor, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    MAIN: gl.constexpr, TAIL: gl.constexpr, HEAD_DIM: gl.constexpr,
) -> None:  # fmt: skip
    """Both parts of a warpgroup's rows, divided by their totals; zeros where no key was seen."""
    inverse = 1.0 / gl.where(total > 0, total, 1.0)
    store_rows(
        out, scale_rows(sums, inverse, MAIN), row, kv_head, begin, q_len, out_stride, GROUP, BLOCK_M, 0, MAIN, HEAD_DIM
    )
    if TAIL > 0:
        store_rows(
            out, scale_rows(tails, inverse, TAIL), row, kv_head, begin, q_len, out_stride, GROUP, BLOCK_M, MAIN, TAIL,
            HEAD_DIM,
        )  # fmt: skip
