"""Prefill over pages in Triton: `packed.py`'s FlashAttention-2 with keys looked up in a page table.

Queries are the last tokens of their sequence, so prompts, chunks of prompts and prompts whose beginning is
cached already are one case. Nothing is gathered first: a tile of keys comes straight from its pages.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.launch import Launcher
from tessera.kernels.packed import UNALIGNED, attend_queries, constants
from tessera.kernels.scores import Scores


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=UNALIGNED)
def paged_prefill_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, page_table: tl.tensor, cu_q_lens: tl.tensor, kv_lens: tl.tensor,
    tiles: tl.tensor, sinks: tl.tensor, out: tl.tensor, scale_log2: tl.tensor, cap_log2: tl.tensor,
    q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, out_stride: tl.tensor, table_stride: tl.tensor,
    Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr, V_HEAD_STRIDE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_MAIN: tl.constexpr, HEAD_TAIL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one sequence's new tokens; grid (kv heads, tiles). Shapes as `paged_prefill`."""
    kv_head = tl.program_id(0)
    seq, tile = tl.load(tiles + 2 * tl.program_id(1)), tl.load(tiles + 2 * tl.program_id(1) + 1)
    begin = tl.load(cu_q_lens + seq).to(tl.int64)
    q_len = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32)
    if tile * BLOCK_M >= q_len * GROUP:  # of a graph with room for more
        return
    attend_queries(
        q + begin * q_stride, k + kv_head * K_HEAD_STRIDE, v + kv_head * V_HEAD_STRIDE,
        page_table + seq.to(tl.int64) * table_stride, sinks, out + begin * out_stride,
        q_len, tl.load(kv_lens + seq), tile, kv_head, scale_log2, cap_log2,
        q_stride, k_stride, v_stride, out_stride, Q_HEAD_STRIDE,
        GROUP, HEAD_DIM, HEAD_MAIN, HEAD_TAIL, PAGE_SIZE, CAUSAL, WINDOW, SOFT_CAP, SINKS,
        BLOCK_M, BLOCK_N, PRECISION, NUM_STAGES,
    )  # fmt: skip


_launch_paged_prefill = Launcher(paged_prefill_kernel)


def paged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q_lens: Tensor,
    kv_lens: Tensor,
    page_table: Tensor,
    tiles: Tensor,
    causal: bool,
    scores: Scores,
    options: Mapping[str, int],
) -> Tensor:
    """Attend from each sequence's last tokens to all of its tokens.

    q           [tokens, q_heads, head_dim], may be strided but for its last dimension
    k, v        [pages, page_size, kv_heads, head_dim], each page contiguous, pages one behind the other
    sinks       [q_heads] float32
    cu_q_lens   [seqs + 1] int32
    kv_lens     [seqs] int32
    page_table  [seqs, max_pages] int32, contiguous rows
    tiles       [n, 2] int32: (sequence, tile of its BLOCK_M rows; a row is a query and a head of a group), all once;
                a tile that its sequence does not have is left out
    options     BLOCK_M, BLOCK_N, NUM_STAGES, num_warps
    returns     [tokens, q_heads, head_dim]
    """
    out = q.new_empty(q.shape)
    _launch_paged_prefill(
        (k.shape[2], len(tiles)),
        q, k, v, page_table, cu_q_lens, kv_lens, tiles, kv_lens if sinks is None else sinks, out, *scores.log2,
        q.stride(0), k.stride(1), v.stride(1), out.stride(0), page_table.stride(0),
        K_HEAD_STRIDE=k.stride(2), V_HEAD_STRIDE=v.stride(2), PAGE_SIZE=k.shape[1],
        CAUSAL=causal, **constants(q, k.shape[2], sinks, scores), **options,
    )  # fmt: skip
    return out
