"""flash_attn: Tri Dao's kernels, one backend a generation, since each reads pages in its own way.

`flash_attn:4` follows page tables of any page size, `flash_attn:2` those of pages of 256 tokens; the
wheel of `flash_attn:3` is built without paged keys, so pages are gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.attention.backends.page_lists import list_pages, starts_of
from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape
from tessera.kernels.pages import gather_pages

_KERNELS = {
    "2": r"flash_fwd(_splitkv)?_kernel",
    "3": "FlashAttnFwdSm90",
    "4": r"FlashAttentionForwardSm\d|flash_attn\.?cute",  # CuTe DSL puts the class into the symbol
}
_NOT_OURS = ("pytorch_flash", "cudnn", "fmha", "flashinfer")
_MULTIPLES_OF_8 = range(8, 257, 8)

# Hopper and Blackwell alone: on others (8.x, 12.x) its source asserts that there is no page table. Heads are
# padded to a multiple of 16, but not while they are read from pages.
# Over pages, 4.0.0b36 on an H200 answered wrongly for head_dim 80, 96 and 160 and read memory that is not its own
# for 160 and 256: only the sizes that passed `tessera verify` there are claimed.
_LIMITS_4 = Limits(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    min_capability=(9, 0),
    max_capability=(11, 9),
    windows=True,
    soft_caps=True,
    sinks=True,
    bidirectional=True,
)
# As fa3_fwd_config.py says: FP16, LOCAL (windows) and PAGEDKV are left out of the build.
_LIMITS_3 = Limits(
    dtypes=(torch.bfloat16,),
    head_dims=_MULTIPLES_OF_8,
    padded_head_dims=tuple(size for size in _MULTIPLES_OF_8 if size not in (64, 96, 128, 192, 256)),
    min_capability=(9, 0),
    max_capability=(9, 9),
    soft_caps=True,
    bidirectional=True,
)
_LIMITS_2 = Limits(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=_MULTIPLES_OF_8,
    padded_head_dims=tuple(size for size in _MULTIPLES_OF_8 if size not in (32, 64, 96, 128, 192, 256)),
    page_sizes=range(256, 4097, 256),
    min_capability=(8, 0),
    windows=True,
    soft_caps=True,
    bidirectional=True,
)


def _claim(version: str) -> Claim:
    others = tuple(pattern for other, pattern in _KERNELS.items() if other != version)
    return Claim(must=(_KERNELS[version],), must_not=(*_NOT_OURS, *others))


def _window(shape: Shape, unbounded: int | None) -> tuple[int | None, int | None]:
    """Tokens seen to the left and to the right of one's own, which all three count inclusively."""
    if shape.window is None:
        return unbounded, unbounded
    return shape.window - 1, 0 if shape.causal else shape.window - 1


class FlashAttn4(AttentionBackend[Batch]):
    """FlashAttention 4, compiled by CuTe DSL on first use; reads pages in place."""

    name: ClassVar[str] = "flash_attn:4"
    needs: ClassVar[tuple[str, ...]] = ("cutlass", "flash_attn.cute")
    packages: ClassVar[tuple[str, ...]] = ("flash-attn-4", "nvidia-cutlass-dsl", "torch")
    install: ClassVar[str | None] = "pip install tessera-llm[flash]"
    limits: ClassVar[dict[Phase, Limits]] = {
        Phase.PREFILL: _LIMITS_4,
        Phase.DECODE: replace(_LIMITS_4, graphs=True),
        Phase.VISION: replace(_LIMITS_4, head_dims=_MULTIPLES_OF_8, padded_head_dims=range(8, 257, 16)),
    }

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """Those of the limits, and sizes that only Hopper's kernel takes."""
        reasons = super().reasons_against(phase, shape)
        if shape.capability[0] in (10, 11) and 128 < shape.head_dim < 256:
            reasons.append(f"head_dim {shape.head_dim} on Blackwell: only up to 128, and 256")
        return reasons

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """Its class's name in the symbol, and no other library's attention."""
        return _claim("4")

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._attend: Any = import_module("flash_attn.cute").flash_attn_varlen_func
        self._options = {
            "softmax_scale": shape.scale,
            "window_size": _window(shape, None),
            "softcap": shape.soft_cap or 0.0,
        }

    def plan(self, batch: Batch) -> Batch:
        """Nothing: the kernel reads the batch's own tensors, which is why a graph of it stays valid."""
        return batch

    def run(self, plan: Batch, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One call; split keys exist only for Blackwell, so they are never asked for."""
        options: dict[str, Any] = {**self._options, "learnable_sink": sinks}
        if self.phase is Phase.DECODE:
            # One query a sequence sees all its keys: no causal mask, and no list of lengths to search.
            pages = {"page_table": plan.page_table, "seqused_k": plan.kv_lens}
            out: Tensor = self._attend(q[:, None], k, v, max_seqlen_k=plan.max_kv_len, **pages, **options)[0]
            return out[:, 0]
        options |= {"cu_seqlens_q": plan.cu_q_lens, "max_seqlen_q": plan.max_q_len, "max_seqlen_k": plan.max_kv_len}
        if self.phase is Phase.VISION:
            options |= {"cu_seqlens_k": plan.cu_q_lens}
        else:
            options |= {"page_table": plan.page_table, "seqused_k": plan.kv_lens, "causal": self.shape.causal}
        packed: Tensor = self._attend(q, k, v, **options)[0]
        return packed


@dataclass(frozen=True)
class FlashAttn3Plan:
    """Which pages are gathered, and where each sequence's keys then lie."""

    batch: Batch
    pages: Tensor | None
    """[n] int32; None in VISION, where keys lie one behind the other already."""
    cu_kv_lens: Tensor
    """[seqs + 1] int32: in whole pages, of which `kv_lens` says how much is used."""


class FlashAttn3(AttentionBackend[FlashAttn3Plan]):
    """FlashAttention 3 for Hopper, from the wheel fa3-fwd: bfloat16 only, pages gathered before each call."""

    name: ClassVar[str] = "flash_attn:3"
    needs: ClassVar[tuple[str, ...]] = ("fa3_fwd_interface",)
    packages: ClassVar[tuple[str, ...]] = ("fa3-fwd", "torch")
    install: ClassVar[str | None] = "pip install tessera-llm[flash]"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS_3)

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """A cutlass kernel that has the library's class as its parameter."""
        return _claim("3")

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._attend: Any = import_module("fa3_fwd_interface").flash_attn_varlen_func
        self._options = {
            "softmax_scale": shape.scale,
            "causal": shape.causal and phase is Phase.PREFILL,
            "softcap": shape.soft_cap or 0.0,
            "num_splits": 0 if phase is Phase.DECODE else 1,  # 0: as many as fill the device
        }
        self._buffers = torch.empty(2, 0)  # [2, pages, page_size, kv_heads, head_dim]: what was gathered last

    def plan(self, batch: Batch) -> FlashAttn3Plan:
        """List the pages, and make the buffers that they are gathered into hold them."""
        if self.phase is Phase.VISION:
            return FlashAttn3Plan(batch, None, batch.cu_q_lens)
        assert self.shape.page_size is not None
        lists = list_pages(batch, self.shape.page_size)
        self._reserve(lists.pages)
        return FlashAttn3Plan(batch, lists.pages, lists.starts * self.shape.page_size)

    def run(self, plan: FlashAttn3Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Gather, then one call."""
        lens: dict[str, Any] = {}
        if plan.pages is not None:
            k_buffer, v_buffer = self._buffers[:, : len(plan.pages)]
            k, v = gather_pages(k, plan.pages, k_buffer), gather_pages(v, plan.pages, v_buffer)
            lens = {"seqused_k": plan.batch.kv_lens}
        batch = plan.batch
        out: Tensor = self._attend(
            q, k, v, batch.cu_q_lens, plan.cu_kv_lens, batch.max_q_len, batch.max_kv_len, **lens, **self._options
        )
        return out

    def _reserve(self, pages: Tensor) -> None:
        assert self.shape.page_size is not None
        if self._buffers.device != pages.device or self._buffers.shape[1] < len(pages):
            size = (2, len(pages), self.shape.page_size, self.shape.num_kv_heads, self.shape.head_dim)
            self._buffers = torch.empty(size, dtype=self.shape.dtype, device=pages.device)


@dataclass(frozen=True)
class FlashAttn2Plan:
    """The batch, and in PREFILL where each sequence's keys would begin were they packed."""

    batch: Batch
    cu_kv_lens: Tensor | None
    """[seqs + 1] int32"""


class FlashAttn2(AttentionBackend[FlashAttn2Plan]):
    """FlashAttention 2, from Ampere on; reads pages in place where they hold a multiple of 256 tokens."""

    name: ClassVar[str] = "flash_attn:2"
    needs: ClassVar[tuple[str, ...]] = ("flash_attn.flash_attn_interface",)
    packages: ClassVar[tuple[str, ...]] = ("flash-attn", "torch")
    install: ClassVar[str | None] = "pip install flash-attn --no-build-isolation"
    limits: ClassVar[dict[Phase, Limits]] = {
        **dict.fromkeys(Phase, _LIMITS_2),
        Phase.DECODE: replace(_LIMITS_2, graphs=True),
    }

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The library's kernel, which torch's copy shares a name with but not the namespace."""
        return _claim("2")

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._library: Any = import_module("flash_attn.flash_attn_interface")
        self._options = {
            "softmax_scale": shape.scale,
            "causal": shape.causal and phase is not Phase.VISION,
            "window_size": _window(shape, -1),
            "softcap": shape.soft_cap or 0.0,
        }

    def plan(self, batch: Batch) -> FlashAttn2Plan:
        """DECODE and VISION read the batch's own tensors; PREFILL wants prefix sums of the keys' lengths too."""
        if self.phase is not Phase.PREFILL:
            return FlashAttn2Plan(batch, None)
        return FlashAttn2Plan(batch, starts_of(batch.kv_lens_cpu).to(batch.kv_lens.device, non_blocking=True))

    def run(self, plan: FlashAttn2Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """One call."""
        batch = plan.batch
        if self.phase is Phase.DECODE:
            lens = {"cache_seqlens": batch.kv_lens, "block_table": batch.page_table}
            out: Tensor = self._library.flash_attn_with_kvcache(q[:, None], k, v, **lens, **self._options)
            return out[:, 0]
        cu_kv_lens = batch.cu_q_lens if plan.cu_kv_lens is None else plan.cu_kv_lens
        packed: Tensor = self._library.flash_attn_varlen_func(
            q,
            k,
            v,
            batch.cu_q_lens,
            cu_kv_lens,
            batch.max_q_len,
            batch.max_kv_len,
            block_table=None if self.phase is Phase.VISION else batch.page_table,
            **self._options,
        )
        return packed
