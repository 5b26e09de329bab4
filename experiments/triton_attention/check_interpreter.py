"""Every kernel against the dense reference in Triton's interpreter, on the CPU (about 8 minutes on 2 cores).

TRITON_INTERPRET=1 python check_interpreter.py, with numpy < 2.4 (the interpreter of triton 3.6 needs it).
"""

from __future__ import annotations

import itertools
import sys

import torch
from decode import DecodeConfig, PagedDecode
from prefill import PrefillConfig, packed_attention, paged_prefill
from reference import dense, dense_paged, paged_inputs, prefix_sums, relative_error

LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3}


def check_decode(
    config: DecodeConfig, heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype
) -> float:
    """Relative error of one decode configuration on ragged lengths, run twice with the lengths changed between."""
    worst = 0.0
    decode = PagedDecode(*heads, head_dim, head_dim**-0.5, page_size, 5, 300, 4, "cpu", config)
    for kv_lens in ([1, 70, 200, 0, 33], [299, 16, 5, 64, 128]):
        x = paged_inputs([1] * 5, kv_lens, heads, head_dim, page_size, dtype, "cpu")
        out = torch.full_like(x.q, float("nan"))
        decode.plan(x.kv_lens)
        decode.run(x.q, x.k_pages, x.v_pages, x.page_table, x.kv_lens, out)
        worst = max(worst, relative_error(out, dense_paged(x, head_dim**-0.5))[1])
    if bool(decode.arrivals.any()):
        return float("inf")
    return worst


def check_prefill(
    config: PrefillConfig, heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype
) -> float:
    """Relative error of one prefill configuration, with and without tokens already in the cache."""
    q_lens, kv_lens = [40, 1, 70, 17], [40, 33, 100, 81]
    x = paged_inputs(q_lens, kv_lens, heads, head_dim, page_size, dtype, "cpu")
    if config.tma:
        for pages in (x.k_pages, x.v_pages):
            pages[pages == 500.0] = 1.0
    out = torch.full_like(x.q, float("nan"))
    paged_prefill(
        x.q, x.k_pages, x.v_pages, x.page_table, x.cu_q_lens, x.kv_lens, max(q_lens), head_dim**-0.5, out, config
    )
    return relative_error(out, dense_paged(x, head_dim**-0.5))[1]


def check_packed(config: PrefillConfig, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> float:
    """Relative error of one packed configuration; q, k and v are views into one fused projection."""
    lens = [50, 64, 7]
    fused = torch.randn(sum(lens), heads[0] + 2 * heads[1], head_dim).to(dtype)
    q, k, v = fused.split([heads[0], heads[1], heads[1]], 1)
    out = torch.full((sum(lens), heads[0], head_dim), float("nan"), dtype=dtype)
    packed_attention(q, k, v, prefix_sums(lens, "cpu"), max(lens), head_dim**-0.5, out, config)
    parts = [
        dense(*(x[a : a + n] for x in (q, k, v)), head_dim**-0.5, False)
        for a, n in zip((0, 50, 114), lens, strict=True)
    ]
    return relative_error(out, torch.cat(parts))[1]


def main() -> int:
    """Run everything; 1 where an error is over its limit."""
    bad = 0
    decodes = [
        DecodeConfig(dot=dot, block_n=block, heads=n, fused=fused, balanced=balanced, num_splits=splits, min_split=floor)
        for dot, block in (("rows", 32), ("cols", 64), ("cores", 16))
        for n in (1, 3)
        for fused, balanced, splits, floor in (
            (True, False, 4, 32), (False, False, 4, 32), (True, False, None, 64), (True, True, None, 64), (True, False, 19, 16),
        )
    ]  # fmt: skip
    decodes += [DecodeConfig(block_n=64, balanced=True, programs_per_sm=n) for n in (1, 3, 40)]
    shapes = [((9, 3), 64, 16), ((12, 3), 80, 32), ((3, 3), 128, 1)]
    for config, (heads, dim, page) in itertools.product(decodes, shapes):
        if config.dot == "cores" and config.heads > 1:
            continue
        for dtype in (torch.float32, torch.float16):
            if dtype == torch.float16 and dim != 64:
                continue
            error = check_decode(config, heads, dim, page, dtype)
            bad += report(f"decode  {config.name():44} {heads} {dim} page {page} {dtype}", error, dtype)
    for config in (PrefillConfig(32, 16), PrefillConfig(16, 32, cut_head=False), PrefillConfig(32, 32, tma=True)):
        for heads, dim, page in [((6, 2), 64, 16), ((4, 4), 72, 8), ((4, 2), 128, 64)]:
            if config.tma and page != 64:
                continue
            for dtype in (torch.float32, torch.float16):
                error = check_prefill(config, heads, dim, page, dtype)
                bad += report(f"prefill {config.name()} {heads} {dim} page {page} {dtype}", error, dtype)
    for config in (PrefillConfig(32, 16), PrefillConfig(16, 32, cut_head=False)):
        for heads, dim in [((4, 4), 64), ((4, 4), 72), ((4, 2), 80)]:
            for dtype in (torch.float32, torch.float16):
                error = check_packed(config, heads, dim, dtype)
                bad += report(f"packed  {config.name()} {heads} {dim} {dtype}", error, dtype)
    print("all good" if not bad else f"{bad} bad")
    return int(bad > 0)


def report(what: str, error: float, dtype: torch.dtype) -> bool:
    """Print one line; whether the error is over the limit (NaN is)."""
    good = error < LIMIT[dtype]
    print(f"{'ok ' if good else 'BAD'} {error:.1e}  {what}", flush=True)
    return not good


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
