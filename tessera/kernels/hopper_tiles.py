"""Pieces of the kernels for Hopper that move tiles: where they lie, into shared memory, and answers back.

Of `hopper_prefill.py` four warps, a warpgroup, work on 64 rows, a row being a query and a head of the group that shares
a key head, and heads that are no power of two have two parts, as in `packed.py`. `hopper_gate_up.py` shares what makes
and copies tiles.
"""

# ruff: noqa: N803, RUF005 -- what is compiled in is written in capitals, and the compiler knows no starred tuples
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, assignment"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

copy_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # by Triton's version
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # all threads of a partition; by version too
_REINTERPRETS: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def nth_number(turn: gl.tensor) -> gl.tensor:
    """The number of the tile that this program takes at its `turn`; every second round is dealt out backwards.

    Tiles stand longest first: dealt out in one direction, the first programs would have the longer one of every round.
    """
    programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 1, programs - 1 - gl.program_id(0), gl.program_id(0))
    return turn * programs + place


@gluon.jit
def count_turns(num_tiles: gl.tensor) -> gl.tensor:
    """How many tiles this program takes: as many as there are whole rounds, and one of the rest if its turn has one."""
    rounds = num_tiles // gl.num_programs(0)
    return rounds + gl.where(nth_number(rounds) < num_tiles, 1, 0)


@gluon.jit
def find_piece(turn: gl.tensor, num_tiles: gl.tensor, tiles: gl.tensor, HEADS: gl.constexpr) -> tuple[gl.tensor, ...]:
    """The key head, the sequence and the tile of it at a turn; behind the last turn those of the last tile."""
    number = gl.minimum(nth_number(turn), num_tiles - 1)
    place = tiles + 2 * (number // HEADS)
    return number % HEADS, gl.load(place), gl.load(place + 1)


@gluon.jit
def find_lens(seq: gl.tensor, cu_q_lens: gl.tensor, kv_lens: gl.tensor) -> tuple[gl.tensor, ...]:
    """Where a sequence's queries begin, their number and that of its tokens."""
    begin = gl.load(cu_q_lens + seq)
    return begin, gl.load(cu_q_lens + seq + 1) - begin, gl.load(kv_lens + seq)


@gluon.jit
def find_keys(
    row: gl.tensor, q_len: gl.tensor, kv_len: gl.tensor, GROUP: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
) -> tuple[gl.tensor, ...]:  # fmt: skip
    """The first and the last tile of keys that rows from `row` on see; one where they see none."""
    last = kv_len - q_len + gl.minimum((row + ROWS - 1) // GROUP, q_len - 1)
    end = gl.minimum(kv_len, last + 1) if CAUSAL else (gl.minimum(kv_len, last + WINDOW) if WINDOW > 0 else kv_len)
    end = gl.where(row < q_len * GROUP, end, 0)  # a tile that its sequence does not have, of a graph with room for more
    low = gl.maximum(kv_len - q_len + row // GROUP - WINDOW + 1, 0) // BLOCK_N if WINDOW > 0 else row * 0
    return low, gl.maximum(gl.cdiv(end, BLOCK_N) - 1, low)


@gluon.jit
def find_slots(
    table_row: gl.tensor, begin: gl.tensor, first: gl.tensor, kv_len: gl.tensor, BLOCK_N: gl.constexpr,
    PAGE_SIZE: gl.constexpr, BOX: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """Where each BOX tokens of the tile begin in the pools; past the last token the last page stands again.

    Without pages (PAGE_SIZE 0) tokens lie one after another from `begin` on, and past the last those of the next
    sequence.
    """
    slots = ()
    for part in gl.static_range(BLOCK_N // BOX):
        if PAGE_SIZE == 0:
            slots = slots + (begin + first + part * BOX,)
        else:
            token = gl.minimum(first + part * BOX, gl.maximum(kv_len - 1, 0) // BOX * BOX)
            slots = slots + (gl.load(table_row + token // PAGE_SIZE) * PAGE_SIZE + token % PAGE_SIZE,)
    return slots


@gluon.jit
def copy_tile(
    desc: tma.tensor_descriptor, smem: gl.shared_memory_descriptor, ready: gl.shared_memory_descriptor,
    slots: gl.tuple, column: gl.tensor, stage: gl.tensor, BLOCK_N: gl.constexpr, BOX: gl.constexpr,
) -> None:  # fmt: skip
    """Start copying BOX tokens from each of `slots`."""
    for part in gl.static_range(BLOCK_N // BOX):
        copy_box(desc, [slots[part], column], ready.index(stage), smem.index(stage).slice(part * BOX, BOX, 0))


@gluon.jit
def load_rows(
    q: gl.tensor, kv_head: gl.tensor, row: gl.tensor, begin: gl.tensor, q_len: gl.tensor, q_stride: gl.tensor,
    Q_HEAD_STRIDE: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of one group's queries [BLOCK_M, WIDTH], zeros past the last row and column."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (WIDTH // 8), WIDTH // 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    head = kv_head * GROUP + rows % GROUP
    starts = (begin + rows // GROUP).to(gl.int64) * q_stride + head * Q_HEAD_STRIDE
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    real = (rows // GROUP < q_len)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        real = real & (column < HEAD_DIM)[None, :]
    return gl.load(q + starts[:, None] + column[None, :], mask=real, other=0.0)


@gluon.jit
def store_rows(
    out: gl.tensor, values: gl.tensor, row: gl.tensor, kv_head: gl.tensor, begin: gl.tensor, q_len: gl.tensor,
    out_stride: gl.tensor, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, FIRST: gl.constexpr, WIDTH: gl.constexpr,
    HEAD_DIM: gl.constexpr,
) -> None:  # fmt: skip
    """Write columns FIRST .. FIRST + WIDTH of rows back to where their heads lie."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (WIDTH // 8), WIDTH // 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    starts = (begin + rows // GROUP).to(gl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * HEAD_DIM
    column = FIRST + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    real = (rows // GROUP < q_len)[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        real = real & (column < HEAD_DIM)[None, :]
    stored = gl.convert_layout(values.to(out.dtype.element_ty), layout)
    gl.store(out + starts[:, None] + column[None, :], stored, mask=real)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, STAGES: gl.constexpr) -> gl.shared_memory_descriptor:
    """One barrier a stage, passed when COUNT have arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=COUNT)
    return barriers


@gluon.jit
def make_tiles(
    dtype: gl.constexpr, NUMBER: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
) -> gl.shared_memory_descriptor:  # fmt: skip
    """Shared memory for so many tiles; for the tail that no head has (WIDTH 0), the least there can be."""
    rows: gl.constexpr = ROWS if WIDTH > 0 else 16
    width: gl.constexpr = WIDTH if WIDTH > 0 else 16
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, width], dtype)
    return gl.allocate_shared_memory(dtype, [NUMBER, rows, width], layout)


@gluon.jit
def reuse(ring: gl.shared_memory_descriptor, ROWS: gl.constexpr, WIDTH: gl.constexpr) -> gl.shared_memory_descriptor:
    """The first bytes of a ring's tiles as one tile of another shape, for numbers of the same type.

    Whoever writes there sees to it that all products with the ring are done, in every warp.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], ring.dtype)
    if _REINTERPRETS:
        tile = ring.reinterpret(ring.dtype, [ROWS, WIDTH], layout)
    else:  # as Triton called it up to 3.6
        tile = ring._reinterpret(ring.dtype, [ROWS, WIDTH], layout)
    return tile
