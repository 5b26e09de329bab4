"""flex: torch's FlexAttention, compiled, on pages where they lie.

Queries are cut into tiles that belong to one sequence each, and a tile is one element of FlexAttention's
batch; its block mask lists the pages of its sequence, so nothing is gathered. Tiles are padded to a few
counts, because every count is a compilation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from tessera.attention.backends.flex_tiles import VISION_PAGE, Tiler, Tiles
from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape

MIN_TOKENS = 1024
"""VISION pads packed keys to a power of two, at least this: fewer compilations for a copy."""

_LIMITS = Limits(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=range(16, 257),
    page_sizes=(16, 32, 64, 128, 256),
    devices=("cpu", "cuda"),
    windows=True,
    soft_caps=True,
    sinks=True,
    bidirectional=True,
)


@dataclass(frozen=True)
class FlexPlan:
    """The tiles of a step, and their block masks."""

    tiles: Tiles
    num_pages: int
    """Pages that the masks count; in VISION those that the packed keys are padded to."""
    masks: tuple[BlockMask, ...]
    """One a call."""


class Flex(AttentionBackend[FlexPlan]):
    """Serves every phase through a compiled kernel; never in the uncompiled form, which is not fused.

    Each number of tiles is compiled when it is first met.
    """

    name: ClassVar[str] = "flex"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS)

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """What the limits forbid, and on a CPU what the compiled kernel lacks."""
        reasons = super().reasons_against(phase, shape)
        return reasons + _cpu_reasons(shape) if shape.device_type == "cpu" else reasons

    @classmethod
    def costly(cls, phase: Phase, shape: Shape) -> str | None:
        """On a CPU every new size is compiled by a C++ compiler."""
        return "compiling it takes tens of seconds on a CPU: name it to use it" if shape.device_type == "cpu" else None

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """Inductor's own kernel, by the name it is given; on a CPU also none of the unfused operators."""
        if shape.device_type == "cpu":
            # Inductor names the kernels of its C++ templates so, and every other one `graph_n_cpp_fused_...`.
            return Claim(must=(r"^graph_\d+_kernel$",), must_not=("aten::bmm", "scaled_dot_product"))
        return Claim(must=("triton_.*flex",), must_not=("pytorch_flash", "fmha_cutlass", "cudnn.*sdpa"))

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._tiler = Tiler(phase, shape)
        self._compiled: dict[tuple[int, int], Callable[..., Tensor]] = {}

    def plan(self, batch: Batch) -> FlexPlan:
        """Cut the queries into tiles and build their block masks."""
        tiles, num_pages = self._tiler.tiles(batch), batch.num_pages
        if self.phase is Phase.VISION:
            tokens = max(MIN_TOKENS, sum(batch.q_lens_cpu))
            num_pages = (1 << (tokens - 1).bit_length()) // VISION_PAGE
        return FlexPlan(tiles, num_pages, self._tiler.block_masks(tiles, num_pages))

    def run(self, plan: FlexPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One compiled call a group of tiles, on a GPU of all."""
        if self.phase is Phase.VISION:
            padding = (0, 0, 0, 0, 0, plan.num_pages * VISION_PAGE - len(k))
            k, v = pad(k, padding), pad(v, padding)
        else:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        keys, values = (x.transpose(0, 1)[None] for x in (k, v))
        queries = q.index_select(0, plan.tiles.rows).view(-1, self._tiler.queries, *q.shape[1:]).transpose(1, 2)
        outputs, at = [], 0
        for mask in plan.masks:
            num = mask.kv_num_blocks.shape[0]
            attend = self._attend(num, plan.num_pages)
            outputs.append(attend(queries[at : at + num], keys, values, mask, sinks))
            at += num
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out.transpose(1, 2).reshape(-1, *q.shape[1:]).index_select(0, plan.tiles.back)

    def _attend(self, num_tiles: int, num_pages: int) -> Callable[..., Tensor]:
        """The compiled call for these sizes, made once; it refuses to run uncompiled."""
        key = num_tiles, num_pages
        if key not in self._compiled:
            # Torch counts recompilations by code object and gives up after a few: each call has its own.
            code = _attend.__code__.replace(co_name=f"_attend_{num_tiles}_{num_pages}")
            own = FunctionType(code, _attend.__globals__)
            # The option gives the kernel a name that a profiler sees; on a GPU it has one.
            options: dict[str, Any] = {"cpp.enable_kernel_profile": True}
            on_cpu = self.shape.device_type == "cpu"
            compiled = torch.compile(own, fullgraph=True, dynamic=False, options=options if on_cpu else None)
            self._compiled[key] = partial(compiled, self.shape, _kernel_options(self.shape, self._tiler.page_size))
        return self._compiled[key]


def _attend(
    shape: Shape, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, sinks: Tensor | None
) -> Tensor:
    """What is compiled. q [tiles, q_heads, queries, head_dim]; k, v [1, kv_heads, slots, head_dim]."""
    arguments: dict[str, Any] = {
        "block_mask": mask,
        "scale": shape.scale,
        "enable_gqa": True,
        "score_mod": None if shape.soft_cap is None else _score_mod(shape.soft_cap),
        "kernel_options": options,
    }
    if sinks is None:
        out: Tensor = flex_attention(q, k, v, **arguments)
        return out
    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **arguments)
    # A sink adds exp(sink) to the sum that the weights were divided by, exp(lse).
    return (out * torch.sigmoid(aux.lse - sinks[:, None])[..., None]).to(out.dtype)


def _score_mod(soft_cap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, tile: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001
        return soft_cap * torch.tanh(score / soft_cap)

    return cap


def _kernel_options(shape: Shape, page_size: int) -> dict[str, Any]:
    # A Triton tile of keys must divide a page.
    return {"BLOCK_N": min(page_size, 64)} if shape.device_type == "cuda" else {}


def _cpu_reasons(shape: Shape) -> list[str]:
    reasons = []
    if not _has_compiler():
        reasons.append("torch.compile needs a C++ compiler on a CPU")
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        reasons.append("torch compiles flex_attention for CPUs with AVX2 only")
    if shape.sinks:
        reasons.append("no attention sinks on a CPU: torch does not return the logsumexp there")
    return reasons


@cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
