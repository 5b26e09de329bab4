"""The two kernels of `small_linear`: plain multiply-adds for one to four rows, tensor cores for up to sixteen.

Both read each weight once, in loads of 16 bytes, and know nothing of how the tiles were chosen. Under programmatic
dependent launch (PDL) a program asks for weights before it waits for the launch before it, whose output it reads
afterwards only.
"""

# ruff: noqa: N803, N806, RUF005 -- what Triton compiles in is written in capitals, and it knows no starred tuples
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, assignment"
from __future__ import annotations

import triton
import triton.language as tl

from tessera.kernels.dependent import wait_for_launch


@triton.jit
def _weight_rows(
    weight: tl.tensor, num_outputs: tl.tensor, K: tl.constexpr, TILE: tl.constexpr, GATED: tl.constexpr
) -> tl.tensor:
    """Where this program's TILE rows of the weight begin; if GATED of TILE / 2 outputs gate, up, gate, up ...

    Rows past the last are the last once more, so that no load of weights needs a mask; what comes of them is not
    stored.
    """
    place = tl.arange(0, TILE)
    if GATED:
        output = tl.minimum(tl.program_id(0) * (TILE // 2) + place // 2, num_outputs - 1)
        row = place % 2 * num_outputs + output
    else:
        row = tl.minimum(tl.program_id(0) * TILE + place, num_outputs - 1)
    return weight + row.to(tl.int64) * K


@triton.jit
def _beside(
    bias: tl.tensor, residual: tl.tensor, residual_stride: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor,
    ROWS: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The bias of the rows that `_weight_rows` names, [1, TILE], and the residual, [ROWS, outputs]; float32.

    Loaded before the product, for whose end they would have to be waited for.
    """
    OUTPUTS: tl.constexpr = TILE // 2 if GATED else TILE
    biases = tl.zeros([1, TILE], tl.float32)
    added = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if BIAS:
        biases = tl.load(_weight_rows(bias, num_outputs, 1, TILE, GATED)).to(tl.float32)[None, :]
    if RESIDUAL:
        row = tl.arange(0, ROWS)[:, None]
        output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
        real = (row < num_rows) & (output < num_outputs)
        added = tl.load(residual + row * residual_stride + output, mask=real, other=0.0).to(tl.float32)
    return biases, added


@triton.jit
def _finish(
    total: tl.tensor, squares: tl.tensor, biases: tl.tensor, added: tl.tensor, out: tl.tensor, num_rows: tl.tensor,
    num_outputs: tl.tensor, eps: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GATED: tl.constexpr,
) -> None:  # fmt: skip
    """What comes after the product, [ROWS, TILE], and the one rounding; squares [ROWS], the rest as of `_beside`."""
    OUTPUTS: tl.constexpr = TILE // 2 if GATED else TILE
    if NORM:
        total = total * tl.rsqrt(squares / K + eps)[:, None]
    if BIAS:
        total += biases
    if GATED:
        gate, up = tl.split(tl.reshape(total, [ROWS, OUTPUTS, 2]))
        total = gate / (1.0 + tl.exp(-gate)) * up
    if RESIDUAL:
        total += added
    row = tl.arange(0, ROWS)[:, None]
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    real = (row < num_rows) & (output < num_outputs)
    tl.store(out + row * num_outputs + output, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def _chunk(
    pointers: tl.tensor, start: tl.tensor, K: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """[TILE, CHUNK] of the weight from column `start`; zeros beyond K, which needs no look where the chunk is WHOLE."""
    column = start + tl.arange(0, CHUNK)[None, :]
    if WHOLE:
        return tl.load(pointers[:, None] + column, eviction_policy="evict_first")
    return tl.load(pointers[:, None] + column, mask=column < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _add_chunk(
    tile: tl.tensor, sums: tl.tuple, squares: tl.tuple, x: tl.tensor, x_stride: tl.tensor, num_rows: tl.tensor,
    norm_weight: tl.tensor, start: tl.tensor,
    K: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, WHOLE: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """One chunk of all rows times one tile, onto sums [TILE, CHUNK] and squares [CHUNK], a tuple of ROWS each.

    Nothing is added up across threads: a thread keeps its own columns until the end.
    """
    column = start + tl.arange(0, CHUNK)
    wide = tile.to(tl.float32)
    if NORM:
        if WHOLE:
            factors = tl.load(norm_weight + column).to(tl.float32)
        else:
            factors = tl.load(norm_weight + column, mask=column < K, other=0.0).to(tl.float32)
    new_sums = ()
    new_squares = ()
    for row in tl.static_range(ROWS):
        real = column < K
        if ROWS > 1:
            real = real & (tl.full([CHUNK], row, tl.int32) < num_rows)
            values = tl.load(x + row * x_stride + column, mask=real, other=0.0).to(tl.float32)
        elif WHOLE:
            values = tl.load(x + column).to(tl.float32)
        else:
            values = tl.load(x + column, mask=real, other=0.0).to(tl.float32)
        if NORM:
            new_squares = new_squares + (tl.fma(values, values, squares[row]),)
            values = values * factors
        else:
            new_squares = new_squares + (squares[row],)
        new_sums = new_sums + (tl.fma(wide, tl.broadcast_to(values[None, :], wide.shape), sums[row]),)
    return new_sums, new_squares


@triton.jit
def _zeros(ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr) -> tl.tuple:
    """Sums and squares of nothing yet, as `_add_chunk` takes them."""
    sums = ()
    squares = ()
    for _row in tl.static_range(ROWS):
        sums = sums + (tl.zeros([TILE, CHUNK], tl.float32),)
        squares = squares + (tl.zeros([CHUNK], tl.float32),)
    return sums, squares


@triton.jit
def _sum_each(parts: tl.tuple, AXIS: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """The sums of 1, 2 or 4 tensors along an axis, side by side in further dimensions: one pass across the warps."""
    if ROWS == 1:
        joined = parts[0]
    elif ROWS == 2:
        joined = tl.join(parts[0], parts[1])
    else:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    return tl.sum(joined, AXIS)


@triton.jit(do_not_specialize=["num_rows"])
def few_rows_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, norm_weight: tl.tensor, residual: tl.tensor, out: tl.tensor,
    x_stride: tl.tensor, residual_stride: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor, eps: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HELD: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Up to ROWS rows times TILE rows of the weight; grid (tiles). Shapes as `small_linear`; num_outputs of `out`.

    HELD chunks of the weight are in registers or on their way into them: as one is used, that which is HELD chunks
    further on is asked for. Nothing but addresses separates the first HELD loads from the launch.
    """
    SPAN: tl.constexpr = HELD * CHUNK
    LAST: tl.constexpr = (K - 1) // SPAN * SPAN
    pointers = _weight_rows(weight, num_outputs, K, TILE, GATED)
    tiles = ()
    for held in tl.static_range(HELD):
        tiles = tiles + (_chunk(pointers, held * CHUNK, K, CHUNK, (held + 1) * CHUNK <= K),)
    wait_for_launch(PDL)
    biases, added = _beside(bias, residual, residual_stride, num_rows, num_outputs, ROWS, TILE, BIAS, RESIDUAL, GATED)
    sums, squares = _zeros(ROWS, TILE, CHUNK)
    if LAST > 0:
        for group in tl.range(0, LAST, SPAN):
            following = ()
            for held in tl.static_range(HELD):
                start = group + held * CHUNK
                sums, squares = _add_chunk(
                    tiles[held], sums, squares, x, x_stride, num_rows, norm_weight, start, K, CHUNK, ROWS, NORM, True
                )
                following = following + (_chunk(pointers, start + SPAN, K, CHUNK, K % SPAN == 0),)
            tiles = following
    for held in tl.static_range(HELD):
        sums, squares = _add_chunk(
            tiles[held], sums, squares, x, x_stride, num_rows, norm_weight, LAST + held * CHUNK,
            K, CHUNK, ROWS, NORM, LAST + (held + 1) * CHUNK <= K,
        )  # fmt: skip
    total = tl.trans(tl.reshape(_sum_each(sums, 1, ROWS), [TILE, ROWS]))
    row_squares = tl.zeros([ROWS], tl.float32)
    if NORM:
        if ROWS == 1:  # whose sum is no tensor
            row_squares += _sum_each(squares, 0, ROWS)
        else:
            row_squares = tl.reshape(_sum_each(squares, 0, ROWS), [ROWS])
    _finish(
        total, row_squares, biases, added, out, num_rows, num_outputs, eps, K, ROWS, TILE, NORM, BIAS, RESIDUAL, GATED
    )


@triton.jit
def _prefetch(pointers: tl.tensor, K: tl.constexpr, LINES: tl.constexpr) -> None:
    """Ask for the first LINES lines of 128 bytes of each row to come to the second-level cache."""
    NUMBERS: tl.constexpr = 1024 // pointers.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, LINES) * NUMBERS, K - 1)
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [pointers[:, None] + column[None, :]],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def more_rows_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, norm_weight: tl.tensor, residual: tl.tensor, out: tl.tensor,
    x_stride: tl.tensor, residual_stride: tl.tensor, num_rows: tl.tensor, num_outputs: tl.tensor, eps: tl.tensor,
    K: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    LINES: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Up to ROWS = 16 rows times TILE rows of the weight by tensor cores; grid (tiles). As `few_rows_kernel`.

    STAGES chunks are on their way into shared memory. As copies there cannot be waited for apart from the loop that
    makes them, PDL has LINES lines of each row brought into the second-level cache instead.
    """
    pointers = _weight_rows(weight, num_outputs, K, TILE, GATED)
    if PDL:
        _prefetch(pointers, K, LINES)
    wait_for_launch(PDL)
    biases, added = _beside(bias, residual, residual_stride, num_rows, num_outputs, ROWS, TILE, BIAS, RESIDUAL, GATED)
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, TILE], tl.float32)
    squares = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in tl.range(0, K, CHUNK, num_stages=STAGES):
        column = start + tl.arange(0, CHUNK)[None, :]
        tile = _chunk(pointers, start, K, CHUNK, K % CHUNK == 0)
        values = tl.load(x + row * x_stride + column, mask=(row < num_rows) & (column < K), other=0.0)
        if NORM:
            factors = tl.load(norm_weight + column, mask=column < K, other=0.0).to(tl.float32)
            wide = values.to(tl.float32)
            squares += wide * wide
            values = (wide * factors).to(values.dtype)
        total = tl.dot(values, tl.trans(tile), total, input_precision="ieee")
    _finish(
        total, tl.sum(squares, 1), biases, added, out, num_rows, num_outputs, eps,
        K, ROWS, TILE, NORM, BIAS, RESIDUAL, GATED,
    )  # fmt: skip
