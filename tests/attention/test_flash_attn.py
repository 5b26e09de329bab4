"""flash_attn: what it refuses, and on stand-ins that do what the libraries' documentation says, what it asks for."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cuda_library_cases import HOPPER, Backend, attend, every_claim, shape_for, unpaged
from tessera.attention.backends.flash_attn import FlashAttn2, FlashAttn3, FlashAttn4
from tessera.attention.contract import Phase
from tessera.attention.workloads import WORKLOADS, make_case


@pytest.mark.parametrize(
    ("backend", "phase", "change", "reason"),
    [
        (FlashAttn4, Phase.PREFILL, {"capability": (8, 6)}, "needs compute capability 9.0, has 8.6"),
        (FlashAttn4, Phase.PREFILL, {"capability": (12, 0)}, "made for compute capability up to 11.9, has 12.0"),
        (FlashAttn4, Phase.PREFILL, {"capability": (10, 0), "head_dim": 192}, "head_dim 192 on Blackwell"),
        (FlashAttn4, Phase.DECODE, {"head_dim": 72}, "head_dim 72 not in (64, 128)"),
        (FlashAttn3, Phase.PREFILL, {"dtype": torch.float16}, "dtype torch.float16 not in (torch.bfloat16,)"),
        (FlashAttn3, Phase.DECODE, {"window": 16}, "no sliding window, the model has one of 16"),
        (FlashAttn3, Phase.VISION, {"capability": (10, 0)}, "made for compute capability up to 9.9, has 10.0"),
        (FlashAttn2, Phase.DECODE, {"page_size": 16}, "page_size 16 not in range(256, 4097, 256)"),
        (FlashAttn2, Phase.DECODE, {"sinks": True}, "no attention sinks, the model has them"),
    ],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_what_it_cannot_serve_it_refuses(backend: Backend, phase: Phase, change: dict[str, Any], reason: str) -> None:
    reasons = backend.reasons_against(phase, replace(HOPPER, **change))
    assert any(found.startswith(reason) for found in reasons), reasons


def flash_attn_4(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, window_size: tuple[int | None, int | None],
    softcap: float, learnable_sink: Tensor | None, causal: bool = False, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, page_table: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """As flash_attn/cute/interface.py says of flash_attn_varlen_func."""
    assert max_seqlen_k is not None
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap,
                    "sink": learnable_sink}  # fmt: skip
    queries = list(q) if cu_seqlens_q is None else list(torch.split(q, cu_seqlens_q.diff().tolist()))
    assert cu_seqlens_q is None or max_seqlen_q == max(map(len, queries))
    outs = []
    for row, own in enumerate(queries):
        if page_table is None:
            assert cu_seqlens_k is not None
            keys = [x[cu_seqlens_k[row] : cu_seqlens_k[row + 1]] for x in (k, v)]
        else:
            assert cu_seqlens_k is None
            assert seqused_k is not None
            keys = [unpaged(x, page_table[row], int(seqused_k[row])) for x in (k, v)]
        outs.append(attend(own, *keys, **options))
    return (torch.stack(outs) if cu_seqlens_q is None else torch.cat(outs)), None


def flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_k: Tensor | None = None, *, softmax_scale: float, causal: bool, softcap: float, num_splits: int,
) -> Tensor:  # fmt: skip
    """As fa3_fwd_interface.py says of flash_attn_varlen_func."""
    assert num_splits in (0, 1)
    lens = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(lens.max()))
    outs = []
    for row, own in enumerate(torch.split(q, cu_seqlens_q.diff().tolist())):
        keys = slice(int(cu_seqlens_k[row]), int(cu_seqlens_k[row]) + int(lens[row]))
        outs.append(attend(own, k[keys], v[keys], scale=softmax_scale, causal=causal, cap=softcap))
    return torch.cat(outs)


def flash_attn_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor | None,
) -> Tensor:  # fmt: skip
    """As flash_attn_interface.py says of flash_attn_varlen_func."""
    assert (max_seqlen_q, max_seqlen_k) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap}
    outs = []
    for row, own in enumerate(torch.split(q, cu_seqlens_q.diff().tolist())):
        start, end = cu_seqlens_k[row : row + 2].tolist()
        keys = [x[start:end] if block_table is None else unpaged(x, block_table[row], end - start) for x in (k, v)]
        outs.append(attend(own, *keys, **options))
    return torch.cat(outs)


def flash_attn_2_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, softmax_scale: float,
    causal: bool, window_size: tuple[int, int], softcap: float,
) -> Tensor:  # fmt: skip
    """As flash_attn_interface.py says."""
    options: Any = {"scale": softmax_scale, "causal": causal, "window": window_size, "cap": softcap}
    lens = cache_seqlens.tolist()
    keys = [[unpaged(x, block_table[row], n) for x in (k_cache, v_cache)] for row, n in enumerate(lens)]
    return torch.stack([attend(own, *pair, **options) for own, pair in zip(q, keys)])


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the libraries' names."""
    modules: dict[str, dict[str, Any]] = {
        "flash_attn.cute": {"flash_attn_varlen_func": flash_attn_4},
        "fa3_fwd_interface": {"flash_attn_varlen_func": flash_attn_3},
        "flash_attn.flash_attn_interface": {
            "flash_attn_varlen_func": flash_attn_2,
            "flash_attn_with_kvcache": flash_attn_2_with_kvcache,
        },
    }
    for name, functions in modules.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**functions))


@every_claim(FlashAttn4, FlashAttn3, FlashAttn2)
@pytest.mark.usefixtures("stand_ins")
def test_what_the_library_is_asked_for_is_what_the_workload_asks(backend: Backend, phase: Phase, name: str) -> None:
    case = make_case(phase, WORKLOADS[phase][name], shape_for(backend))
    assert case.problems(case.answer(backend)) == []
