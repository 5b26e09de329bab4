"""xformers: keys gathered, then its memory-efficient attention, one launch for a whole ragged batch.

Facts checked in the wheel of xformers 0.0.35 (read, not run): its metadata asks for torch >= 2.10, its
extension was built with torch 2.10.0+cu128, and its CUTLASS operator calls torch's own
`aten::_efficient_attention_forward`. So the kernels are those of torch_sdpa:efficient; what xformers adds
are the block-diagonal masks. The operator is refused on compute capability above 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape, import_error

_FMHA = "xformers.ops.fmha"
_LIMITS = Limits(
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    head_dims=range(8, 257, 8),
    max_capability=(9, 0),
    windows=True,
    bidirectional=True,
)


@dataclass(frozen=True)
class XFormersPlan:
    """What is gathered, and who sees what of it."""

    slots: Tensor | None
    """[keys] int64: where the keys of all sequences lie, one sequence after another; None in VISION."""
    bias: Any
    """xformers' block-diagonal mask: its class decides what is causal and what is local."""


class XFormers(AttentionBackend[XFormersPlan]):
    """Serves every phase with the CUTLASS operator and no other: xformers is not asked to choose.

    Query heads that share a key head: in DECODE they are so many queries of one head, which costs nothing;
    else keys and values are repeated for them.
    """

    name: ClassVar[str] = "xformers"
    needs: ClassVar[tuple[str, ...]] = ("xformers",)
    packages: ClassVar[tuple[str, ...]] = ("xformers", "torch")
    install: ClassVar[str | None] = "pip install tessera-llm[xformers]"
    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(Phase, _LIMITS)

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """What the limits forbid, then what the operator itself says to such tensors."""
        reasons = super().reasons_against(phase, shape)
        if phase is Phase.PREFILL and shape.window is not None and not shape.causal:
            reasons.append("no window to both sides, xformers' local masks are causal")
        if reasons:
            return reasons
        return [error] if (error := import_error(_FMHA)) else _operator_reasons(shape)

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """CUTLASS forward kernels, torch's since xformers no longer brings its own."""
        return Claim(must=("fmha_cutlassF",), must_not=("pytorch_flash", "cudnn.*sdpa", "flash::"))

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._fmha = import_module(_FMHA)
        self._operator = import_module(f"{_FMHA}.cutlass").FwOp
        self._masks = import_module(f"{_FMHA}.attn_bias")

    def plan(self, batch: Batch) -> XFormersPlan:
        """List the slots of the keys that are seen, and build the mask."""
        device = batch.kv_lens.device
        if self.phase is Phase.VISION:
            return XFormersPlan(None, self._bias(batch.q_lens_cpu, batch.q_lens_cpu, device))
        first = [self._first_key(q_len, kv_len) for q_len, kv_len in zip(batch.q_lens_cpu, batch.kv_lens_cpu)]
        counts = [max(1, kv_len) - start for start, kv_len in zip(first, batch.kv_lens_cpu)]
        decode = self.phase is Phase.DECODE
        q_lens = [self.shape.group] * len(counts) if decode else batch.q_lens_cpu
        return XFormersPlan(self._slots(batch.page_table, first, counts), self._bias(q_lens, counts, device))

    def run(self, plan: XFormersPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Gather in the paged phases, then one launch."""
        assert sinks is None
        shape = self.shape
        if plan.slots is not None:
            k, v = (x.flatten(0, 1).index_select(0, plan.slots) for x in (k, v))
        if self.phase is Phase.DECODE:
            folded = (len(q), shape.num_kv_heads, shape.group, shape.head_dim)
            queries = q.view(folded).transpose(1, 2).reshape(-1, shape.num_kv_heads, shape.head_dim)
            out = self._attend(queries, k, v, plan.bias)
            return out.view(len(q), shape.group, shape.num_kv_heads, -1).transpose(1, 2).reshape(q.shape)
        if shape.group > 1:
            k, v = (x.repeat_interleave(shape.group, 1) for x in (k, v))
        return self._attend(q, k, v, plan.bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        """All [tokens, heads, head_dim], of one number of heads."""
        out: Tensor = self._fmha.memory_efficient_attention_forward(
            q[None], k[None], v[None], bias, scale=self.shape.scale, op=self._operator
        )
        return out[0]

    def _first_key(self, q_len: int, kv_len: int) -> int:
        """The oldest key that a sequence's queries see."""
        window = self.shape.window
        return 0 if window is None else max(0, kv_len - q_len - window + 1)

    def _slots(self, table: Tensor, first: list[int], counts: list[int]) -> Tensor:
        assert self.shape.page_size is not None
        device, total = table.device, sum(counts)
        start, count = (torch.tensor(x, device=device) for x in (first, counts))
        row = torch.repeat_interleave(count, output_size=total)
        position = torch.arange(total, device=device) - (count.cumsum(0) - count - start)[row]
        return table[row, position // self.shape.page_size] * self.shape.page_size + position % self.shape.page_size

    def _bias(self, q_lens: list[int], kv_lens: list[int], device: torch.device) -> Any:
        mask = self._masks.BlockDiagonalMask.from_seqlens(q_lens, kv_lens, device=device)
        if self.phase is not Phase.PREFILL or not self.shape.causal:
            return mask
        if self.shape.window is None:
            return mask.make_causal_from_bottomright()
        return mask.make_local_attention_from_bottomright(self.shape.window)


def _operator_reasons(shape: Shape) -> list[str]:
    """The operator's own objections to tensors of this type and size; none where there is no GPU to ask about."""
    if not torch.cuda.is_available():
        return []
    fmha, operator = import_module(_FMHA), import_module(f"{_FMHA}.cutlass").FwOp
    if operator.OPERATOR is None:
        return ["xformers does not know this torch's memory-efficient attention"]
    one = torch.zeros(1, 1, 1, shape.head_dim, dtype=shape.dtype, device=shape.device_type)
    return [f"xformers: {reason}" for reason in operator.not_supported_reasons(fmha.Inputs(one, one, one))]
