"""What a warpgroup of `hopper_prefill.py` does: attend for its 64 rows of every tile that its program takes.

While the tensor cores multiply the weights of one tile of keys with its values, the softmax of the next is computed,
over the borders of tiles of queries too: the last product with values and the first with the next queries' keys run
together. Tiles of keys are taken from the last to the first, for masks are at the end.

A ring of tiles is passed as (main part, tail, barriers of stages that are full, barriers of stages that are free).
"""

# ruff: noqa: N803 -- what is compiled in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from tessera.kernels.hopper_parts import (
    await_sums,
    begin_sums,
    keep_queries,
    load_queries,
    multiply_values,
    store_answers,
)
from tessera.kernels.hopper_softmax import (
    as_operand,
    begin_softmax,
    clear_values,
    mask,
    multiply_keys,
    scale_rows,
    softmax,
)
from tessera.kernels.hopper_tiles import count_turns, find_keys, find_lens, find_piece


@gluon.jit
def _attend_first(
    scores: gl.tensor, values: gl.tuple, position: gl.tensor, kv_len: gl.tensor, low: gl.tensor,
    high: gl.tensor, tile: gl.tensor, peak: gl.tensor, total: gl.tensor, count: gl.tensor, rates: gl.tuple,
    dtype: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The weights of the last tile of keys, with the peak and the total; values past the sequence's end are cleared."""
    v_main, v_tail, v_ready, _v_free = values
    scale_log2, cap_log2 = rates
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage, phase, first = count % STAGES, (count // STAGES) & 1, tile * BLOCK_N
    token = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :] + first
    scores = mask(
        scores, token, position, kv_len, first, low, high, scale_log2, cap_log2, True, BLOCK_N, CAUSAL, WINDOW,
        SOFT_CAP,
    )  # fmt: skip
    weights, peak, total, _shrink = softmax(scores, peak, total, 1.0 if SOFT_CAP else scale_log2)
    if first + BLOCK_N > kv_len:
        mbarrier.wait(v_ready.index(stage), phase)
        clear_values(v_main.index(stage), first, kv_len, MAIN, BLOCK_N)
        if TAIL > 0:
            clear_values(v_tail.index(stage), first, kv_len, TAIL, BLOCK_N)
        fence_async_shared()
    return as_operand(weights.to(dtype), MAIN), peak, total


@gluon.jit
def _attend_rest(
    q_main: gl.shared_memory_descriptor, q_tail: gl.shared_memory_descriptor, keys: gl.tuple, values: gl.tuple,
    turns: gl.shared_memory_descriptor, steps: gl.tensor, weights: gl.tensor, position: gl.tensor, kv_len: gl.tensor,
    low: gl.tensor, high: gl.tensor, tile: gl.tensor, num_tiles: gl.tensor, peak: gl.tensor, total: gl.tensor,
    count: gl.tensor, rates: gl.tuple, PART: gl.constexpr, WARPGROUPS: gl.constexpr, TAKE_TURNS: gl.constexpr,
    MAIN: gl.constexpr, TAIL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The other tiles of keys, each one's softmax under the product of the weights before it with their values."""
    k_main, k_tail, k_ready, k_free = keys
    _v_main, _v_tail, v_ready, v_free = values
    scale_log2, cap_log2 = rates
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums, tails = begin_sums(BLOCK_M, MAIN, TAIL)
    first, token = tile * BLOCK_N, gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))[None, :] + tile * BLOCK_N
    for _ in range(num_tiles):
        before, phase_before = count % STAGES, (count // STAGES) & 1
        count += 1
        stage, phase = count % STAGES, (count // STAGES) & 1
        first -= BLOCK_N
        token -= BLOCK_N
        mbarrier.wait(k_ready.index(stage), phase)
        if TAKE_TURNS:  # a warpgroup's products run while the others compute their softmax
            mbarrier.wait(turns.index(PART), (steps & 1) ^ (1 if PART == 0 else 0))
            steps += 1
        pending = multiply_keys(q_main, q_tail, k_main.index(stage), k_tail.index(stage), TAIL, BLOCK_M, BLOCK_N)
        mbarrier.wait(v_ready.index(before), phase_before)
        pending_sums, pending_tails = multiply_values(weights, values, before, sums, tails, TAIL)
        if TAKE_TURNS:
            mbarrier.arrive(turns.index((PART + 1) % WARPGROUPS), count=1)
        scores = warpgroup_mma_wait(2 if TAIL > 0 else 1, [pending])
        mbarrier.arrive(k_free.index(stage), count=1)
        scores = mask(
            scores, token, position, kv_len, first, low, high, scale_log2, cap_log2, False, BLOCK_N, CAUSAL, WINDOW,
            SOFT_CAP,
        )  # fmt: skip
        fresh, peak, total, shrink = softmax(scores, peak, total, 1.0 if SOFT_CAP else scale_log2)
        sums, tails = await_sums(pending_sums, pending_tails, 0, TAIL)
        mbarrier.arrive(v_free.index(before), count=1)
        sums = scale_rows(sums, shrink, MAIN)
        tails = scale_rows(tails, shrink, TAIL) if TAIL > 0 else sums
        weights = as_operand(fresh.to(q_main.dtype), MAIN)
    return weights, sums, tails, total, count, steps


@gluon.jit
def _begin_scores(
    queries: gl.tuple, buffer: gl.tensor, keys: gl.tuple, count: gl.tensor, TAIL: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The scores of tile `count` of the ring with the queries of a buffer, on their way."""
    stage = count % STAGES
    mbarrier.wait(keys[2].index(stage), (count // STAGES) & 1)
    return multiply_keys(
        queries[0].index(buffer), queries[1].index(buffer), keys[0].index(stage), keys[1].index(stage), TAIL, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@gluon.jit
def _finish_tile(
    weights: gl.tensor, sums: gl.tensor, tails: gl.tensor, queries: gl.tuple, buffer: gl.tensor, keys: gl.tuple,
    values: gl.tuple, count: gl.tensor, q: gl.tensor, following: gl.tuple, q_stride: gl.tensor, EARLY: gl.constexpr,
    Q_HEAD_STRIDE: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, MAIN: gl.constexpr, TAIL: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """Sums with the first tile of values, the last to be added; the scores of the following queries, on their way."""
    stage = count % STAGES
    mbarrier.wait(values[2].index(stage), (count // STAGES) & 1)
    pending_sums, pending_tails = multiply_values(weights, values, stage, sums, tails, TAIL)
    if not EARLY:  # into the only buffer, for all products with what stood there are done
        main, tail = load_queries(q, following, q_stride, Q_HEAD_STRIDE, GROUP, BLOCK_M, MAIN, TAIL, HEAD_DIM)
        keep_queries(queries, buffer, main, tail, TAIL)
    pending = _begin_scores(queries, buffer, keys, count + 1, TAIL, BLOCK_M, BLOCK_N, STAGES)
    sums, tails = await_sums(pending_sums, pending_tails, 2 if TAIL > 0 else 1, TAIL)
    mbarrier.arrive(values[3].index(stage), count=1)
    return pending, sums, tails, count + 1


@gluon.jit
def _attend_tile(
    pending: gl.tensor, count: gl.tensor, buffer: gl.tensor, steps: gl.tensor, turn: gl.tensor, this: gl.tuple,
    following: gl.tuple, PART: gl.constexpr, q: gl.tensor, queries: gl.tuple, keys: gl.tuple, values: gl.tuple,
    turns: gl.shared_memory_descriptor, out: gl.tensor, sinks: gl.tensor, where: gl.tuple, kv_lens: gl.tensor,
    num_tiles: gl.tensor, rates: gl.tuple, out_stride: gl.tensor, Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, MAIN: gl.constexpr,
    TAIL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, EARLY: gl.constexpr, TAKE_TURNS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """One tile, whose first scores are `pending`; those of the following are when it returns, with the new state.

    this, following  of the tile and of the next: key head, this warpgroup's first row, where the sequence's queries
                     begin, their number, and its tokens'. Those of the one after that are returned: what they are
                     loaded from takes its time, which passes under the products.
    """
    layout: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    kv_head, row, begin, q_len, kv_len = this
    lowest, highest = find_keys(row - PART * BLOCK_M, q_len, kv_len, GROUP, ROWS, BLOCK_N, CAUSAL, WINDOW)
    low, high = kv_len - q_len + row // GROUP, kv_len - q_len + (row + BLOCK_M - 1) // GROUP
    rows = row + gl.arange(0, BLOCK_M, layout)
    position = (kv_len - q_len + rows // GROUP)[:, None]
    peak, total = begin_softmax(sinks, kv_head * GROUP + rows % GROUP, BLOCK_M, BLOCK_N, SINKS)
    fresh = buffer ^ 1 if EARLY else buffer
    if EARLY:
        main, tail = load_queries(q, following, where[2], Q_HEAD_STRIDE, GROUP, BLOCK_M, MAIN, TAIL, HEAD_DIM)
    later_head, later_seq, later_place = find_piece(turn + 2, num_tiles, where[1], HEADS)
    scores = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(keys[3].index(count % STAGES), count=1)
    weights, peak, total = _attend_first(
        scores, values, position, kv_len, low, high, highest, peak, total, count, rates, q.dtype.element_ty, MAIN,
        TAIL, BLOCK_N, STAGES, CAUSAL, WINDOW, SOFT_CAP,
    )  # fmt: skip
    if EARLY:
        keep_queries(queries, fresh, main, tail, TAIL)
    later_begin, later_q_len, later_kv_len = find_lens(later_seq, where[0], kv_lens)
    weights, sums, tails, total, count, steps = _attend_rest(
        queries[0].index(buffer), queries[1].index(buffer), keys, values, turns, steps, weights, position, kv_len, low,
        high, highest, highest - lowest, peak, total, count, rates, PART, WARPGROUPS, TAKE_TURNS, MAIN, TAIL, BLOCK_M,
        BLOCK_N, STAGES, CAUSAL, WINDOW, SOFT_CAP,
    )  # fmt: skip
    pending, sums, tails, count = _finish_tile(
        weights, sums, tails, queries, fresh, keys, values, count, q, following, where[2], EARLY, Q_HEAD_STRIDE, GROUP,
        BLOCK_M, MAIN, TAIL, HEAD_DIM, BLOCK_N, STAGES,
    )  # fmt: skip
    store_answers(out, sums, tails, total, row, kv_head, begin, q_len, out_stride, GROUP, BLOCK_M, MAIN, TAIL, HEAD_DIM)
    later_row = later_place * ROWS + PART * BLOCK_M
    return pending, count, fresh, steps, later_head, later_row, later_begin, later_q_len, later_kv_len


@gluon.jit
def _find_tile(
    turn: gl.tensor, num_tiles: gl.tensor, where: gl.tuple, kv_lens: gl.tensor, PART: gl.constexpr,
    HEADS: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """What `_attend_tile` wants to know of the tile at a turn."""
    kv_head, seq, place = find_piece(turn, num_tiles, where[1], HEADS)
    begin, q_len, kv_len = find_lens(seq, where[0], kv_lens)
    return kv_head, place * ROWS + PART * BLOCK_M, begin, q_len, kv_len


@gluon.jit
def consume(
    PART: gl.constexpr, queries: gl.tuple, data: gl.tuple, Q_HEAD_STRIDE: gl.constexpr, HEADS: gl.constexpr,
    GROUP: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, MAIN: gl.constexpr,
    TAIL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr, SINKS: gl.constexpr, EARLY: gl.constexpr, TAKE_TURNS: gl.constexpr,
    WARPGROUPS: gl.constexpr,
) -> None:  # fmt: skip
    """Attend for the rows of warpgroup PART in every tile of this program.

    queries  main part and tail, two buffers of them where EARLY, else one
    data     q, keys, values, barriers for taking turns, out, sinks, (cu_q_lens, tiles, q_stride), kv_lens, number of
             tiles, (scale, soft cap) in units of log2, out_stride
    """
    q, keys, values, turns, out, sinks, where, kv_lens, num_tiles, rates, out_stride = data
    first = gl.program_id(0) * 0
    head, row, begin, q_len, kv_len = _find_tile(first, num_tiles, where, kv_lens, PART, HEADS, BLOCK_M, ROWS)
    main, tail = load_queries(
        q, (head, row, begin, q_len), where[2], Q_HEAD_STRIDE, GROUP, BLOCK_M, MAIN, TAIL, HEAD_DIM
    )
    next_head, next_row, next_begin, next_q_len, next_kv_len = _find_tile(
        first + 1, num_tiles, where, kv_lens, PART, HEADS, BLOCK_M, ROWS
    )
    keep_queries(queries, 0, main, tail, TAIL)
    pending = _begin_scores(queries, 0, keys, 0, TAIL, BLOCK_M, BLOCK_N, STAGES)
    count, buffer, steps = 0, 0, 0
    for turn in range(count_turns(num_tiles)):
        this = (head, row, begin, q_len, kv_len)
        following = (next_head, next_row, next_begin, next_q_len, next_kv_len)
        head, row, begin, q_len, kv_len = following
        pending, count, buffer, steps, next_head, next_row, next_begin, next_q_len, next_kv_len = _attend_tile(
            pending, count, buffer, steps, turn, this, following, PART, q, queries, keys, values, turns, out, sinks,
            where, kv_lens, num_tiles, rates, out_stride, Q_HEAD_STRIDE, HEADS, GROUP, BLOCK_M, ROWS, HEAD_DIM, MAIN,
            TAIL, BLOCK_N, STAGES, CAUSAL, WINDOW, SOFT_CAP, SINKS, EARLY, TAKE_TURNS, WARPGROUPS,
        )  # fmt: skip
    warpgroup_mma_wait(0, [pending])
