"""From projected heads to pages in one launch: normalise and rotate q and k, and write k and v to their slots.

Apart these are two norms, a concatenation, three operations of rotation and two scattered writes, which read
and write keys up to five times. Here every number is read once and written once.
"""

# ruff: noqa: N803, N806 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.dependent import launch_constants, pdl_on, wait_for_launch
from tessera.kernels.launch import Launch, Launcher
from tessera.kernels.turn import Turn

BLOCK = 1024
"""Numbers a program: a few heads of one token."""
MAX_HEADS = 16


@triton.jit
def _turned(
    first: tl.tensor, second: tl.tensor, weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor, eps: tl.tensor,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Both halves of heads, [heads, PAD] each, normalised and rotated; rounded wherever torch's operators do."""
    dtype = first.dtype
    column = tl.arange(0, PAD)
    if NORM:
        low, high = first.to(tl.float32), second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        low_weight = tl.load(weight + column, mask=column < HALF, other=0.0).to(tl.float32)
        high_weight = tl.load(weight + HALF + column, mask=column < HEAD_DIM - HALF, other=0.0).to(tl.float32)
        first = (low * scale * low_weight[None, :]).to(dtype)
        second = (high * scale * high_weight[None, :]).to(dtype)
    if ROPE:
        low, high = first.to(tl.float32), second.to(tl.float32)
        cosine = tl.load(cosines + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        sine = tl.load(sines + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
        first = ((low * cosine).to(dtype).to(tl.float32) - high * sine).to(dtype)
        second = ((high * cosine).to(dtype).to(tl.float32) + low * sine).to(dtype)
    return first, second


@triton.jit
def _move_heads(
    source: tl.tensor, target: tl.tensor, first_head: tl.tensor, weight: tl.tensor, cosines: tl.tensor,
    sines: tl.tensor, eps: tl.tensor,
    NUM_HEADS: tl.constexpr, SOURCE_STRIDE: tl.constexpr, TARGET_STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
) -> None:  # fmt: skip
    """HEADS heads of one token from source to target, which begin at that token's head 0; strides between heads."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    head = first_head + tl.arange(0, HEADS)
    column = tl.arange(0, PAD)[None, :]
    in_first = (head < NUM_HEADS)[:, None] & (column < HALF)
    in_second = (head < NUM_HEADS)[:, None] & (column < HEAD_DIM - HALF)
    start = source + head[:, None] * SOURCE_STRIDE + column
    first = tl.load(start, mask=in_first, other=0.0)
    second = tl.load(start + HALF, mask=in_second, other=0.0)
    first, second = _turned(first, second, weight, cosines, sines, eps, HEAD_DIM, HALF, PAD, NORM, ROPE)
    end = target + head[:, None] * TARGET_STRIDE + column
    tl.store(end, first, mask=in_first)
    tl.store(end + HALF, second, mask=in_second)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rope_pages_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, out: tl.tensor, k_pages: tl.tensor, v_pages: tl.tensor,
    slots: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor, cosines: tl.tensor, sines: tl.tensor,
    q_stride: tl.tensor, k_stride: tl.tensor, v_stride: tl.tensor, k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor, cosine_stride: tl.tensor, sine_stride: tl.tensor, eps: tl.tensor,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_HEAD_STRIDE: tl.constexpr, K_HEAD_STRIDE: tl.constexpr,
    V_HEAD_STRIDE: tl.constexpr, K_PAGE_HEAD_STRIDE: tl.constexpr, V_PAGE_HEAD_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A few heads of q, of k or of v of one token; grid (tokens * blocks of heads). Shapes as `rope_pages`."""
    Q_BLOCKS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // (Q_BLOCKS + 2 * KV_BLOCKS)).to(tl.int64)
    block = tl.program_id(0) % (Q_BLOCKS + 2 * KV_BLOCKS)
    wait_for_launch(PDL)
    cosines += token * cosine_stride
    sines += token * sine_stride
    if block < Q_BLOCKS:
        _move_heads(
            q + token * q_stride, out + token * (Q_HEADS * HEAD_DIM), block * HEADS, q_weight, cosines, sines, eps,
            Q_HEADS, Q_HEAD_STRIDE, HEAD_DIM, HEAD_DIM, HEADS, PAD, NORM, ROPE,
        )  # fmt: skip
        return
    slot = tl.load(slots + token)
    if slot < 0:  # padding
        return
    if block < Q_BLOCKS + KV_BLOCKS:
        _move_heads(
            k + token * k_stride, k_pages + slot * k_slot_stride, (block - Q_BLOCKS) * HEADS, k_weight,
            cosines, sines, eps, KV_HEADS, K_HEAD_STRIDE, K_PAGE_HEAD_STRIDE, HEAD_DIM, HEADS, PAD, NORM, ROPE,
        )  # fmt: skip
    else:
        _move_heads(
            v + token * v_stride, v_pages + slot * v_slot_stride, (block - Q_BLOCKS - KV_BLOCKS) * HEADS, k_weight,
            cosines, sines, eps, KV_HEADS, V_HEAD_STRIDE, V_PAGE_HEAD_STRIDE, HEAD_DIM, HEADS, PAD, False, False,
        )  # fmt: skip


_launch_rope_pages = Launcher(rope_pages_kernel)


class _Heads(NamedTuple):
    """What a launch is compiled for."""

    q_heads: int
    kv_heads: int
    head_dim: int
    strides: tuple[int, int, int, int, int]
    """Between heads of q, k, v and of the pages of k and v."""
    norm: bool
    rope: bool
    pdl: bool


def rope_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: Turn,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    pdl: bool | None = None,
) -> Tensor:
    """Turn q and k, write the turned k and v to their slots and touch no other byte of the pages.

    q, k, v           [tokens, q_heads or kv_heads, head_dim], strided but for the last dimension; left as they are
    k_pages, v_pages  [pages, page_size, kv_heads, head_dim], pages one behind the other; written in place
    slots             [tokens] int64, none twice; a negative one is padding and nothing is written for it
    pdl               see `dependent.py`; None: where `pdl_on`
    returns           the turned q, [tokens, q_heads, head_dim], contiguous
    """
    tokens, q_heads, head_dim = q.shape
    out = q.new_empty(tokens, q_heads, head_dim)  # numbers: a shape takes torch twice as long to read
    if not tokens:
        return out
    norm, rope = turn.q_weight is not None, turn.rotation is not None
    cosines, sines = turn.rotation or (q, q)
    (q_stride, q_head, _), (k_stride, k_head, _), (v_stride, v_head, _) = q.stride(), k.stride(), v.stride()
    (_, k_slot, k_page_head, _), (_, v_slot, v_page_head, _) = k_pages.stride(), v_pages.stride()
    strides = (q_head, k_head, v_head, k_page_head, v_page_head)
    with_pdl = pdl_on(q.device) if pdl is None else pdl
    launch, programs = _compiled(_Heads(q_heads, k.shape[1], head_dim, strides, norm, rope, with_pdl))
    launch(
        (tokens * programs,),
        q, k, v, out, k_pages, v_pages, slots,
        turn.q_weight if norm else q, turn.k_weight if norm else q, cosines, sines,
        q_stride, k_stride, v_stride, k_slot, v_slot, cosines.stride()[0], sines.stride()[0], turn.eps,
    )  # fmt: skip
    return out


@cache
def _compiled(of: _Heads) -> tuple[Launch, int]:
    """The launch, and programs a token."""
    pad = triton.next_power_of_2((of.head_dim + 1) // 2)
    most = triton.next_power_of_2(max(of.q_heads, of.kv_heads))
    heads = min(MAX_HEADS, max(1, BLOCK // (2 * pad)), most)
    names = ("Q_HEAD_STRIDE", "K_HEAD_STRIDE", "V_HEAD_STRIDE", "K_PAGE_HEAD_STRIDE", "V_PAGE_HEAD_STRIDE")
    launch = _launch_rope_pages.fixed(
        Q_HEADS=of.q_heads, KV_HEADS=of.kv_heads, HEAD_DIM=of.head_dim, HEADS=heads, PAD=pad,
        NORM=of.norm, ROPE=of.rope, num_warps=max(1, heads * pad // 256), enable_fp_fusion=False,
        **dict(zip(names, of.strides)), **launch_constants(of.pdl),
    )  # fmt: skip
    return launch, triton.cdiv(of.q_heads, heads) + 2 * triton.cdiv(of.kv_heads, heads)
