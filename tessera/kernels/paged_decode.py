"""Decode over pages in Triton: split-KV Flash-Decoding (Dao et al. 2023), the merge fused into the same kernel.

One program attends for one key-value head of one sequence over one span of its tokens, or in `decode_runs` of
several. The queries of a sequence (one, or a few where drafts are checked) and the query heads that share the key head
are the rows of its tile, padded to the 16 that tensor cores take. `decode_shares` says how sequences are shared out
among programs: the grid depends on no length, so a CUDA graph may replay it with any. Whichever program of a sequence
finishes last merges the parts (`decode_merge`). Scores are in units of log2.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.decode_attend import attend_rows, read_old
from tessera.kernels.decode_merge import Workspace, finish_part
from tessera.kernels.decode_runs import paged_decode_kernel_of_runs
from tessera.kernels.decode_shares import Shares, lengths_block, own_span
from tessera.kernels.dependent import launch_constants, let_next_start, pdl_on, wait_for_launch
from tessera.kernels.launch import Launch, Launcher
from tessera.kernels.packed import UNALIGNED
from tessera.kernels.scores import Scores


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "num_splits", "min_split", "capacity"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def paged_decode_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, cu_q_lens: tl.tensor, kv_lens: tl.tensor,
    sinks: tl.tensor, out: tl.tensor, part_out: tl.tensor, part_lse: tl.tensor, arrivals: tl.tensor,
    scale_log2: tl.tensor, cap_log2: tl.tensor, q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor,
    table_stride: tl.tensor, num_seqs: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor, capacity: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, SEQS: tl.constexpr, QUERIES: tl.constexpr,
    ROW_TILES: tl.constexpr, PART_ROWS: tl.constexpr, ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr, PDL: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """One split of one tile of rows of one key head of one sequence; shapes as `paged_decode`. Grid (kv heads *
    ROW_TILES, splits, seqs), or where lengths decide (SEQS > 0) (kv heads * ROW_TILES, units).
    """
    let_next_start(PDL)
    column = tl.program_id(0)
    kv_head, first_row = column // ROW_TILES, (column % ROW_TILES) * PART_ROWS
    seq, split, begin, q_len, kv_len, oldest, start, size, first_part = own_span(
        cu_q_lens, kv_lens, num_seqs, num_splits, min_split, QUERIES, WINDOW, SEQS, BLOCK_N
    )
    table_row, end = page_table + seq * table_stride, tl.minimum(start + size, kv_len)
    k_head, v_head = k + kv_head * K_HEAD_STRIDE, v + kv_head * V_HEAD_STRIDE
    keys, values = read_old(
        k_head, v_head, table_row, start, end, kv_len - q_len, k_stride, v_stride, HEAD_DIM, HEAD_PAD, PAGE_SIZE,
        BLOCK_N, PDL, EARLY,
    )  # fmt: skip
    wait_for_launch(PDL)
    if ((start >= kv_len) & (split > 0)) | (first_row >= q_len * GROUP):
        return
    num_rows = tl.minimum(q_len * GROUP - first_row, PART_ROWS)
    acc, lse = attend_rows(
        q + begin * q_stride, k_head, v_head, keys, values, table_row, sinks, start, end, kv_len - q_len, kv_head,
        first_row, num_rows, split == 0, scale_log2, cap_log2, q_stride, k_stride, v_stride, Q_HEAD_STRIDE, GROUP,
        HEAD_DIM, HEAD_PAD, PAGE_SIZE, CAUSAL, WINDOW, SOFT_CAP, SINKS, QUERIES, ROWS, BLOCK_N, PRECISION, NUM_STAGES,
        EARLY,
    )  # fmt: skip
    heads = tl.num_programs(0) // ROW_TILES
    target = out + (begin * heads + kv_head) * (GROUP * HEAD_DIM)
    first_part = column.to(tl.int64) * capacity + first_part
    finish_part(
        acc, lse, first_part + split, first_part, tl.cdiv(kv_len - oldest, size),
        arrivals + first_part, target, heads, num_rows, first_row, part_out, part_lse,
        GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, ROWS, MERGE_ROWS, PARTS,
    )  # fmt: skip


_launchers = {False: Launcher(paged_decode_kernel), True: Launcher(paged_decode_kernel_of_runs)}
"""By whether programs have equal runs of blocks."""


class Queries(NamedTuple):
    """What kernels are compiled for of queries."""

    dtype: torch.dtype
    q_heads: int
    kv_heads: int
    head_dim: int
    head_stride: int
    """Numbers between heads of one token."""

    @classmethod
    def of(cls, q: Tensor, kv_heads: int) -> Queries:
        """Of q [tokens, q_heads, head_dim]."""
        return cls(q.dtype, q.shape[1], kv_heads, q.shape[2], q.stride(1))


class _Kind(NamedTuple):
    """What else they are compiled for, but for options."""

    queries: Queries
    pages: tuple[int, int, int]
    """Numbers between heads of k and of v, tokens a page."""
    scores: Scores
    sinks: bool
    max_q_len: int
    lengths_block: int
    causal: bool
    one_block: bool
    runs: bool
    pdl: bool


def paged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    workspace: Workspace,
    shares: Shares,
    causal: bool,
    scores: Scores,
    options: Mapping[str, int],
    *,
    pdl: bool | None = None,
) -> Tensor:
    """Attend from each sequence's newest tokens to all of its tokens; zeros where there are none.

    q           [tokens, q_heads, head_dim], may be strided but for its last dimension
    k, v        [pages, page_size, kv_heads, head_dim], each page contiguous, pages one behind the other
    sinks       [q_heads] float32
    cu_q_lens   [seqs + 1] int32, read where shares.max_q_len > 1; else each sequence has one token
    kv_lens     [seqs] int32
    page_table  [seqs, max_pages] int32, contiguous rows
    workspace   room for shares.capacity(seqs) parts of `part_rows` rows for each key head and each tile of its rows
    options     BLOCK_N, NUM_STAGES, num_warps
    pdl         see `dependent.py`; None: where `pdl_on`
    returns     [tokens, q_heads, head_dim]
    """
    out = q.new_empty(*q.shape)  # numbers: a shape takes torch twice as long to read
    num_seqs, page_size = kv_lens.shape[0], k.shape[1]
    queries = Queries.of(q, k.shape[2])
    block = lengths_block(num_seqs) if shares.balanced else 0
    with_pdl = pdl_on(q.device) if pdl is None else pdl
    pages = (k.stride(2), v.stride(2), page_size)
    kind = _Kind(
        queries, pages, scores, sinks is not None, shares.max_q_len, block, causal, shares.one_block, shares.runs,
        with_pdl,
    )  # fmt: skip
    launch, columns = _compiled(kind, tuple(options.items()))
    launch(
        (columns, shares.num_units) if shares.balanced else (columns, shares.num_splits, num_seqs),
        q, k, v, page_table, cu_q_lens, kv_lens, kv_lens if sinks is None else sinks, out,
        workspace.part_out, workspace.part_lse, workspace.arrivals,
        *scores.log2, q.stride(0), k.stride(1), v.stride(1), page_table.stride(0),
        num_seqs, shares.num_splits, shares.min_split, shares.capacity(num_seqs),
    )  # fmt: skip
    return out


@cache
def _compiled(kind: _Kind, options: tuple[tuple[str, int], ...]) -> tuple[Launch, int]:
    """The launch, and the columns of its grid: key heads times tiles of the rows of each."""
    k_head, v_head, page_size = kind.pages
    compiled = constants(kind.queries, kind.sinks, kind.scores, kind.max_q_len, dict(options))
    own = {} if kind.runs else {"EARLY": kind.one_block}
    launch = _launchers[kind.runs].fixed(
        K_HEAD_STRIDE=k_head, V_HEAD_STRIDE=v_head, PAGE_SIZE=page_size, CAUSAL=kind.causal, SEQS=kind.lengths_block,
        **own, **compiled, **launch_constants(kind.pdl),
    )  # fmt: skip
    return launch, kind.queries.kv_heads * compiled["ROW_TILES"]


def constants(
    queries: Queries, sinks: bool, scores: Scores, max_q_len: int, options: Mapping[str, int]
) -> dict[str, Any]:
    """The compile-time arguments that follow from queries."""
    group, head_dim = queries.q_heads // queries.kv_heads, queries.head_dim
    part_rows, row_tiles = tile_rows(group, max_q_len, queries.dtype)
    pad, merge_rows = triton.next_power_of_2(head_dim), triton.next_power_of_2(part_rows)
    return {
        "Q_HEAD_STRIDE": queries.head_stride,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "HEAD_PAD": pad,
        "WINDOW": scores.window or 0,
        "SOFT_CAP": scores.soft_cap is not None,
        "SINKS": sinks,
        "QUERIES": triton.next_power_of_2(max_q_len),
        "ROW_TILES": row_tiles,
        "PART_ROWS": part_rows,
        "ROWS": max(16, merge_rows),
        "MERGE_ROWS": merge_rows,
        "PARTS": max(1, min(16, 2048 * options["num_warps"] // (merge_rows * pad))),
        "PRECISION": "ieee" if queries.dtype == torch.float32 else "tf32",
        **options,
    }


def tile_rows(group: int, max_q_len: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows of a tile that may be real, tiles that the rows of a sequence and key head take).

    Lengths of queries are rounded up to powers of two, for each is compiled anew.
    """
    # Without tensor cores a tile goes through shared memory, of which wide heads leave little.
    most = 16 if dtype == torch.float32 else 64
    rows = triton.next_power_of_2(max_q_len) * group
    return (rows, 1) if rows <= most else (most, -(-rows // most))
