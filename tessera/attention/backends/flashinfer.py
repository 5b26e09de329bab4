"""flashinfer: its wrappers, one backend a kernel, since the library's own choice between them cannot be named.

Kernels are compiled by nvcc on first use of a type, head size and feature, which takes up to a minute
each, unless the package flashinfer-jit-cache brings them ready-made.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.attention.backends.flashinfer_build import build_needed, has_nvcc
from tessera.attention.backends.page_lists import PageLists, list_pages, starts_of
from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape, is_installed
from tessera.attention.cuda import make_event

WORKSPACE_BYTES = 256 << 20
"""What partial results of split keys may take. The library recommends half of this, and raises where that
does not hold a model of many heads of 256."""

_PREFILL = Limits(
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128, 256),
    min_capability=(8, 0),
    windows=True,
    soft_caps=True,
    bidirectional=True,
)
_HOPPER = replace(_PREFILL, min_capability=(9, 0), max_capability=(9, 0))
_TENSOR_CORES = replace(_PREFILL, bidirectional=False, graphs=True)
_CUDA_CORES = replace(_TENSOR_CORES, groups=(1, 2, 3, 4, 8))
_PAGED, _RAGGED = "BatchPrefillWithPagedKVCacheKernel", "BatchPrefillWithRaggedKVCacheKernel"
_ON_HOPPER = r"(?<![A-Za-z])PrefillWithKVCacheKernel"  # as against SinglePrefillWithKVCacheKernel
_DECODE = "BatchDecodeWithPagedKVCacheKernel"
_NOT_OURS = ("pytorch_flash", "cudnn", "fmha", "flash_fwd", "FlashAttn")


class PlannedWrapper:
    """A wrapper of the library, planned for one step at a time."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self._copied: torch.cuda.Event | None = None

    def plan(self, *arguments: Any, **options: Any) -> None:
        """Plan anew, once the device has read the plan before.

        The library writes a plan into one pinned buffer and has it copied while the host goes on:
        written again too early, the earlier step would run with the later one's plan.
        """
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(*arguments, **options)
        if torch.cuda.is_available():
            self._copied = self._copied or make_event()
            self._copied.record()


class _FlashInfer(AttentionBackend[PlannedWrapper]):
    """What the wrappers have in common."""

    needs: ClassVar[tuple[str, ...]] = ("flashinfer",)
    packages: ClassVar[tuple[str, ...]] = ("flashinfer-python", "torch")
    install: ClassVar[str | None] = "pip install tessera-llm[flashinfer]"
    _kernels: ClassVar[str]
    """fa2, fa3, or decode for the kernels of their own that CUDA cores have."""

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """Those of the limits, windows that look ahead, and a compiler that is missing."""
        reasons = super().reasons_against(phase, shape)
        if phase not in cls.limits:
            return reasons
        if not shape.causal and shape.window is not None:
            reasons.append("a window reaches back only, the model's reaches both ways")
        if shape.device_type == "cuda" and not (has_nvcc() or is_installed("flashinfer_jit_cache")):
            reasons.append(
                "flashinfer compiles its kernels on first use, and there is neither nvcc nor the package "
                "flashinfer-jit-cache"
            )
        return reasons

    @classmethod
    def costly(cls, phase: Phase, shape: Shape) -> str | None:
        """A kernel that no earlier use has left on disk takes nvcc up to a minute and a half."""
        return build_needed(cls._kernels, shape)

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._flashinfer: Any = import_module("flashinfer")
        self._workspace = _workspace(shape.device_type)
        self._heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        self._options: dict[str, Any] = {
            "sm_scale": shape.scale,
            "window_left": -1 if shape.window is None else shape.window - 1,  # one's own token is not counted
            "logits_soft_cap": shape.soft_cap,
            "q_data_type": shape.dtype,  # the library's default is float16, whatever it is given
            "kv_data_type": shape.dtype,
        }

    def _page_lists(self, batch: Batch) -> PageLists:
        assert self.shape.page_size is not None
        return list_pages(batch, self.shape.page_size)


class _Prefill(_FlashInfer):
    """PREFILL over pages and VISION over packed keys, by the kernels of one generation."""

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        names = {
            Phase.PREFILL: "BatchPrefillWithPagedKVCacheWrapper",
            Phase.VISION: "BatchPrefillWithRaggedKVCacheWrapper",
        }
        wrapper = getattr(self._flashinfer, names[phase])
        self._planned = PlannedWrapper(wrapper(self._workspace, "NHD", backend=self._kernels))

    def plan(self, batch: Batch) -> PlannedWrapper:
        """Divide the work on the host; the lists that kernels read are copied without waiting."""
        starts = starts_of(batch.q_lens_cpu)
        if self.phase is Phase.VISION:
            self._planned.plan(starts, starts, *self._heads, **self._options)
            return self._planned
        lists = self._page_lists(batch)
        self._planned.plan(
            starts,
            lists.starts_cpu,
            lists.pages,
            lists.last_page_lens_cpu,
            *self._heads,
            self.shape.page_size,
            causal=self.shape.causal,
            **self._options,
        )
        return self._planned

    def run(self, plan: PlannedWrapper, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """One call."""
        keys = (k, v) if self.phase is Phase.VISION else ((k, v),)
        out: Tensor = plan.wrapper.run(q, *keys)
        return out


class FlashInferFa2(_Prefill):
    """The kernels of FlashAttention 2's design, from Ampere on."""

    name: ClassVar[str] = "flashinfer:fa2"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: _PREFILL, Phase.VISION: _PREFILL}
    _kernels: ClassVar[str] = "fa2"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """One kernel for pages and one for packed keys, neither of them Hopper's."""
        must = _RAGGED if phase is Phase.VISION else _PAGED
        return Claim(must=(must,), must_not=(*_NOT_OURS, _ON_HOPPER, _DECODE))


class FlashInferFa3(_Prefill):
    """The kernels of FlashAttention 3's design, for Hopper alone."""

    name: ClassVar[str] = "flashinfer:fa3"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: _HOPPER, Phase.VISION: _HOPPER}
    _kernels: ClassVar[str] = "fa3"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """One kernel serves pages and packed keys."""
        return Claim(must=(_ON_HOPPER,), must_not=(*_NOT_OURS, _PAGED, _RAGGED, _DECODE))


class _Decode(_FlashInfer):
    """DECODE over pages; a captured batch size has a wrapper of its own, whose lists keep their addresses."""

    _tensor_cores: ClassVar[bool]

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._planned = self._wrapper()

    def plan(self, batch: Batch) -> PlannedWrapper:
        """Divide the work on the host; the lists that kernels read are copied without waiting."""
        self._plan_with(self._planned, batch)
        return self._planned

    def run(self, plan: PlannedWrapper, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """One call."""
        out: Tensor = plan.wrapper.run(q, (k, v))
        return out

    def plan_capture(self, batch: Batch) -> PlannedWrapper:
        """A wrapper with buffers for the longest lists, planned so that its grid suits every later length."""
        assert self.shape.page_size is not None
        num_seqs = len(batch.kv_lens_cpu)
        num_pages = max(batch.page_table.shape[1], -(-batch.max_kv_len // self.shape.page_size), 1)
        buffers = {
            "paged_kv_indptr_buffer": num_seqs + 1,
            "paged_kv_indices_buffer": num_seqs * num_pages,
            "paged_kv_last_page_len_buffer": num_seqs,
        }
        device = batch.page_table.device
        planned = self._wrapper(
            use_cuda_graph=True,
            **{name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in buffers.items()},
        )
        self._plan_with(planned, batch)
        return planned

    def update_capture(self, plan: PlannedWrapper, batch: Batch) -> None:
        """Write this step's division of the work into the buffers that the graph reads."""
        self._plan_with(plan, batch)

    def _wrapper(self, **options: Any) -> PlannedWrapper:
        wrapper = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper
        # With tensor cores "auto" would mean fa2 too, but only for the types that are claimed here.
        chosen = {"use_tensor_cores": self._tensor_cores, "backend": "fa2" if self._tensor_cores else "auto"}
        return PlannedWrapper(wrapper(self._workspace, "NHD", **chosen, **options))

    def _plan_with(self, planned: PlannedWrapper, batch: Batch) -> None:
        lists = self._page_lists(batch)
        planned.plan(
            lists.starts_cpu,
            lists.pages,
            lists.last_page_lens_cpu,
            *self._heads,
            self.shape.page_size,
            **self._options,
        )


class FlashInferTensorCores(_Decode):
    """Decode by the paged prefill kernel, a group's query heads in one tile; best where groups are large."""

    name: ClassVar[str] = "flashinfer:tensor_cores"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: _TENSOR_CORES}
    _tensor_cores: ClassVar[bool] = True
    _kernels: ClassVar[str] = "fa2"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The prefill kernel, and not the one for decode."""
        return Claim(must=(_PAGED,), must_not=(*_NOT_OURS, _ON_HOPPER, _DECODE))


class FlashInferCudaCores(_Decode):
    """Decode by vector arithmetic; compiled for the group sizes of DISPATCH_GQA_GROUP_SIZE alone."""

    name: ClassVar[str] = "flashinfer:cuda_cores"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: _CUDA_CORES}
    _tensor_cores: ClassVar[bool] = False
    _kernels: ClassVar[str] = "decode"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The decode kernel, and not the one for prefill."""
        return Claim(must=(_DECODE,), must_not=(*_NOT_OURS, _ON_HOPPER, _PAGED))


@cache
def _workspace(device_type: str) -> Tensor:
    """One for all phases and shapes of a process: a call is done with it before the next one starts."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device_type)
