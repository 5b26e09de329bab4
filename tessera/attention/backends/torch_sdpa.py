"""torch_sdpa: pages gathered, then torch's scaled_dot_product_attention; the default on a CPU.

The query heads that share a key head are folded into one operand, so keys and values are never
repeated. `torch_sdpa` leaves the kernel to torch; a variant allows it one kernel and no other, and is
refused where torch would have taken another.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from tessera.attention.backends.sdpa_plan import DecodePlan, Keys, Plan, Planner, PrefillPart, Tile, VisionRun
from tessera.attention.backends.sdpa_probe import refusals
from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape
from tessera.kernels.pages import gather_pages

_LIMITS = Limits(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cpu", "cuda"),
    windows=True,
    bidirectional=True,
    batch_invariant=("cpu",),
)
_ON_CUDA = replace(_LIMITS, devices=("cuda",))
_HALF_TYPES = (torch.bfloat16, torch.float16)

_FLASH, _MATH = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
_SYMBOLS = {
    SDPBackend.FLASH_ATTENTION: "pytorch_flash::",
    SDPBackend.CUDNN_ATTENTION: "cudnn.*sdpa",
    SDPBackend.EFFICIENT_ATTENTION: "fmha_cutlass",
}
"""What CUDA kernels of torch's fused attentions are called."""


class TorchSdpa(AttentionBackend[Plan]):
    """Serves every shape with the kernel that torch itself picks; on a CPU always its fused one."""

    name: ClassVar[str] = "torch_sdpa"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS)
    only: ClassVar[SDPBackend | None] = None
    """The one kernel that torch may take; None leaves it the choice."""
    dtypes_on: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {}
    """The types that a device's kernel takes where they are fewer than the limits say, which know no devices."""

    @classmethod
    def takes_masks(cls, device_type: str) -> bool:
        """Whether the kernel takes a mask on this kind of device."""
        return cls.only is not SDPBackend.FLASH_ATTENTION or device_type == "cpu"

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """What the limits forbid; for a variant also torch's own reasons, learnt from a tiny call."""
        reasons = super().reasons_against(phase, shape)
        if shape.dtype not in (taken := cls.dtypes_on.get(shape.device_type, (shape.dtype,))):
            reasons.append(f"dtype {shape.dtype} not in {taken} on {shape.device_type}")
        return reasons or ([] if cls.only is None else refusals(cls, cls.only, phase, shape))

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The variant's kernel and no other; where torch picks, on CUDA any of the four."""
        if shape.device_type == "cpu":
            must, must_not = (_MATH, _FLASH) if cls.only is SDPBackend.MATH else (_FLASH, _MATH)
            return Claim((must,), (must_not,))
        if cls.only is None:
            return Claim((f"{'|'.join(_SYMBOLS.values())}|(?i:softmax)",))
        must = _SYMBOLS.get(cls.only, "(?i)softmax")
        return Claim((must,), tuple(symbol for symbol in _SYMBOLS.values() if symbol != must))

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._planner = Planner(phase, shape, masks=self.takes_masks(shape.device_type))
        self._buffers = torch.empty(2, 0)  # [2, pages, page_size, kv_heads, head_dim]: what was gathered last

    def plan(self, batch: Batch) -> Plan:
        """Group and order the sequences, build index and mask tensors, and grow the gather buffers."""
        plan = self._planner.plan(batch)
        parts = plan.groups if isinstance(plan, DecodePlan) else plan
        self._reserve([part.keys for part in parts if not isinstance(part, VisionRun)], batch.page_table.device)
        return plan

    def run(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One call a group of sequences in DECODE, one a tile in PREFILL, one a run of equal lengths in VISION."""
        assert sinks is None
        with nullcontext() if self.only is None else sdpa_kernel(self.only):
            if isinstance(plan, DecodePlan):
                return self._decode(plan, q, k, v)
            out = q.new_empty(q.shape)
            for part in plan:
                if isinstance(part, VisionRun):
                    self._vision(part, q, k, v, out)
                else:
                    self._prefill(part, q, k, v, out)
            return out

    def _decode(self, plan: DecodePlan, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        shape, rows = self.shape, self._planner.rows
        grouped = q.view(len(q), shape.num_kv_heads, shape.group, shape.head_dim)
        if plan.order is not None:
            grouped = grouped.index_select(0, plan.order)
        if rows != shape.group:
            grouped = pad(grouped, (0, 0, 0, rows - shape.group))
        outputs = []
        for group, queries in zip(plan.groups, torch.split(grouped, plan.sizes)):
            k, v = (x[:, group.skip :].transpose(1, 2) for x in self._read(group.keys, k_pages, v_pages))
            outputs.append(scaled_dot_product_attention(queries, k, v, group.mask, scale=shape.scale))
        out = torch.cat(outputs)
        if plan.order is not None:
            out = out.index_select(0, plan.back)
        return out[:, :, : shape.group].reshape(q.shape)

    def _prefill(self, part: PrefillPart, q: Tensor, k_pages: Tensor, v_pages: Tensor, out: Tensor) -> None:
        k, v = (x.squeeze(0).transpose(0, 1).unsqueeze(1) for x in self._read(part.keys, k_pages, v_pages))
        for tile in part.tiles:
            self._prefill_tile(tile, q, k, v, out)

    def _prefill_tile(self, tile: Tile, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """k, v  [kv_heads, 1, keys, head_dim]; on a CPU the query heads of a group read them in place."""
        group = self.shape.group
        grouped = (-1, self.shape.num_kv_heads, group, self.shape.head_dim)
        queries = q[tile.rows].view(grouped).permute(1, 2, 0, 3)
        keys, values = (x[:, :, tile.keys].expand(-1, group, -1, -1) for x in (k, v))
        if q.device.type == "cuda":
            # Torch 2.11's memory-efficient kernel, given a mask and heads of stride 0, computes the last row
            # wrong where there are 64 n + 1 queries (docs/LOG.md).
            keys, values = keys.contiguous(), values.contiguous()
        attended = self._attend(queries, keys, values, tile.mask, causal=tile.causal)
        out[tile.rows].view(grouped).copy_(attended.permute(2, 0, 1, 3))

    def _vision(self, part: VisionRun, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        shape, group = self.shape, self.shape.group
        keys, values = (x[part.tokens] if group == 1 else x[part.tokens].repeat_interleave(group, 1) for x in (k, v))
        size = (-1, part.length, shape.num_q_heads, shape.head_dim)
        queries, keys, values = (x.view(size).transpose(1, 2) for x in (q[part.tokens], keys, values))
        attended = self._attend(queries, keys, values)
        out[part.tokens].view(size).copy_(attended.transpose(1, 2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        if self.only is SDPBackend.CUDNN_ATTENTION and k.shape[-2] == 1:
            return v.expand(q.shape)  # cuDNN takes no single key; its weight is 1
        return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.shape.scale)

    def _read(self, keys: Keys, k_pages: Tensor, v_pages: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, each [seqs, length, kv_heads, head_dim]: in place where possible, else gathered."""
        page_size = k_pages.shape[1]
        if keys.first_slot is not None and keys.first_slot + keys.length <= k_pages.shape[0] * page_size:
            k, v = (x.flatten(0, 1).narrow(0, keys.first_slot, keys.length)[None] for x in (k_pages, v_pages))
            return k, v
        num_pages = len(keys.pages)
        size = (keys.num_seqs, -1, self.shape.num_kv_heads, self.shape.head_dim)
        k, v = (
            gather_pages(pages, keys.pages, buffer[:num_pages]).view(size)[:, : keys.length]
            for pages, buffer in zip((k_pages, v_pages), self._buffers)
        )
        return k, v

    def _reserve(self, keys: list[Keys], device: torch.device) -> None:
        """Make the gather buffers hold the largest of `keys`."""
        num_pages = max((len(one.pages) for one in keys), default=0)
        if num_pages and (self._buffers.device != device or self._buffers.shape[1] < num_pages):
            size = (2, num_pages, self.shape.page_size or 1, self.shape.num_kv_heads, self.shape.head_dim)
            self._buffers = torch.empty(size, dtype=self.shape.dtype, device=device)


class TorchSdpaFlash(TorchSdpa):
    """Torch's flash attention; on CUDA it takes no mask, so sequences of unlike length are decoded one by one."""

    name: ClassVar[str] = "torch_sdpa:flash"
    dtypes_on: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {"cuda": _HALF_TYPES}
    only: ClassVar[SDPBackend | None] = SDPBackend.FLASH_ATTENTION


class TorchSdpaCudnn(TorchSdpa):
    """cuDNN's attention, which prepares itself anew for every length it has not met."""

    name: ClassVar[str] = "torch_sdpa:cudnn"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, replace(_ON_CUDA, dtypes=_HALF_TYPES))
    only: ClassVar[SDPBackend | None] = SDPBackend.CUDNN_ATTENTION


class TorchSdpaEfficient(TorchSdpa):
    """Torch's memory-efficient attention, CUTLASS kernels that once came from xformers."""

    name: ClassVar[str] = "torch_sdpa:efficient"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _ON_CUDA)
    only: ClassVar[SDPBackend | None] = SDPBackend.EFFICIENT_ATTENTION


class TorchSdpaMath(TorchSdpa):
    """Torch's unfused path: matrix product, softmax, matrix product, with every score in memory."""

    name: ClassVar[str] = "torch_sdpa:math"
    only: ClassVar[SDPBackend | None] = SDPBackend.MATH
