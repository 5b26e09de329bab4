"""triton: tessera's own kernels, FlashAttention-2 and Flash-Decoding straight from pages.

They serve every feature of the contract. How they are compiled says `triton_choice.py`. On a Hopper GPU prompts go to a
kernel made for it (`uses_hopper_kernel`), whose options stand beside it and are not tuned. With TRITON_INTERPRET=1 in
the environment the others run on a CPU too, slowly, to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tessera.attention.backends.prefill_tiles import list_tiles, most_tiles, write_tiles
from tessera.attention.backends.triton_backend import TritonBackend, claim_of
from tessera.attention.backends.triton_choice import Choice, choose
from tessera.attention.backends.triton_decode import LIMITS as DECODE_LIMITS
from tessera.attention.backends.triton_decode import Decode, DecodePlan
from tessera.attention.backends.triton_options import (
    INTERPRETED,
    LEAST_SHARED_MEMORY,
    device_resources,
)
from tessera.attention.contract import Batch, Claim, Limits, Phase, Shape, import_error
from tessera.kernels.scores import Scores

KERNELS = {Phase.PREFILL: "paged_prefill_kernel", Phase.DECODE: "paged_decode_kernel", Phase.VISION: "packed_kernel"}
HOPPER_KERNEL = "hopper_prefill_kernel"
HOPPER_SOURCE = "options of the kernel for Hopper GPUs"
WORTH_HOPPER = 3e10
"""Operations of a packed batch from which on the Hopper kernel serves it: a tenth of a millisecond at most, less than
which its launch takes the host longer than `packed_kernel` takes the device."""

_PREFILL = Limits(
    # The interpreter of triton 3.9 multiplies bfloat16 wrongly.
    dtypes=(torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16),
    head_dims=(32, 64, 72, 80, 96, 112, 128, 160, 256),
    padded_head_dims=(72, 112),
    groups=range(1, 65),
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    min_capability=(8, 0),
    shared_memory=LEAST_SHARED_MEMORY,
    windows=True,
    soft_caps=True,
    sinks=True,
    bidirectional=True,
    graphs=True,
    batch_invariant=("cuda", "cpu"),
)


_VISION = replace(
    _PREFILL, graphs=False, batch_invariant=("cpu",)
)  # on a Hopper GPU the size of a batch decides which kernel serves


def uses_hopper_kernel(phase: Phase, shape: Shape) -> bool:
    """Whether `hopper_prefill.py` serves a shape: all its prompts, and packed batches that are `WORTH_HOPPER`."""
    if phase is Phase.PREFILL:
        fits = shape.head_dim >= 64 and shape.page_size in (16, 32, 64, 128, 256)
    else:
        fits = phase is Phase.VISION and shape.head_dim in (64, 72, 80)
    half = shape.dtype in (torch.bfloat16, torch.float16)
    if shape.capability[0] != 9 or not (fits and half):
        return False
    return import_error("tessera.kernels.hopper_prefill") is None  # Gluon is new, and moves with Triton's versions


@dataclass(frozen=True)
class TritonPlan:
    """What `run` needs to know about a step; the tensors are the runner's, but for the tiles."""

    batch: Batch
    tiles: Tensor
    """[n, 2] int32: (sequence, tile of its rows), longest first; see `prefill_tiles`."""
    max_programs: int = 0
    """Of the Hopper kernel; 0: another serves."""


class Triton(TritonBackend[TritonPlan | DecodePlan]):
    """Serves every shape on a GPU with kernels of our own.

    options  how to compile; left out: as was tuned for this device and shape, else as is shipped
    hopper   whether the kernel for Hopper GPUs may serve
    """

    name: ClassVar[str] = "triton"
    limits: ClassVar[dict[Phase, Limits]] = {
        Phase.PREFILL: _PREFILL,
        Phase.DECODE: DECODE_LIMITS,
        Phase.VISION: _VISION,
    }

    @classmethod
    def kernel_of(cls, phase: Phase) -> str:
        """What serves on every GPU."""
        return KERNELS[phase]

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The kernel of the phase, on a Hopper GPU the one that is made for it, or either where the batch decides."""
        kernel = KERNELS[phase]
        if uses_hopper_kernel(phase, shape):
            kernel = HOPPER_KERNEL if phase is Phase.PREFILL else f"({HOPPER_KERNEL}|{kernel})"
        return claim_of(kernel, shape)

    def __init__(self, phase: Phase, shape: Shape, options: Choice | None = None, *, hopper: bool = True) -> None:
        super().__init__(phase, shape)
        self._sms, _ = device_resources(shape)
        self._choice = options or choose(phase, shape)
        self._hopper = hopper and uses_hopper_kernel(phase, shape)
        self._decode = Decode(shape, choice=self._choice, in_blocks=options is None) if phase is Phase.DECODE else None
        self.options_from = HOPPER_SOURCE if self._hopper and phase is Phase.PREFILL else self._choice.source
        if self._decode is not None and self._decode.may_be_in_blocks:
            self.options_from += ", few short sequences a block a program"

    def plan(self, batch: Batch) -> TritonPlan | DecodePlan:
        """List the tiles, or in DECODE choose the splits, from the number of sequences and `max_kv_len` alone."""
        if self._decode is not None:
            return self._decode.plan(batch)
        hopper = self._hopper and self._is_worth_hopper(batch)
        tiles = list_tiles(batch, self._tile_rows(hopper), self.shape.group, causal=self.shape.causal)
        there = torch.from_numpy(tiles).to(batch.cu_q_lens.device, non_blocking=True)
        return TritonPlan(batch, there, max_programs=self._sms if hopper else 0)

    def plan_capture(self, batch: Batch) -> TritonPlan | DecodePlan:
        """As `plan`, with room for the tiles of any batch of as many sequences and no more tokens."""
        if self._decode is not None:
            return self._decode.plan(batch)
        most = most_tiles(sum(batch.q_lens_cpu), len(batch.q_lens_cpu), self._tile_rows(self._hopper), self.shape.group)
        tiles = torch.empty(most, 2, dtype=torch.int32, device=batch.cu_q_lens.device)
        plan = TritonPlan(batch, tiles, max_programs=self._sms if self._hopper else 0)
        self.update_capture(plan, batch)
        return plan

    def update_capture(self, plan: TritonPlan | DecodePlan, batch: Batch) -> None:
        """List the tiles anew, in place."""
        if isinstance(plan, TritonPlan):
            rows = self._tile_rows(plan.max_programs > 0)
            write_tiles(plan.tiles, list_tiles(batch, rows, self.shape.group, causal=self.shape.causal))

    def _tile_rows(self, hopper: bool) -> int:
        """Rows of a tile, by which kernel serves."""
        if not hopper:
            return self._choice.few.block_m
        from tessera.kernels.hopper_prefill import hopper_options

        return hopper_options(self.shape.head_dim, paged=self.phase is Phase.PREFILL).rows

    def _is_worth_hopper(self, batch: Batch) -> bool:
        if self.phase is Phase.PREFILL:
            return True
        products = sum(q_len * kv_len for q_len, kv_len in zip(batch.q_lens_cpu, batch.kv_lens_cpu))
        return 4 * products * self.shape.num_q_heads * self.shape.head_dim >= WORTH_HOPPER

    def _launch(self, plan: TritonPlan | DecodePlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        from tessera.kernels.packed import packed_attention
        from tessera.kernels.paged_prefill import paged_prefill

        if isinstance(plan, DecodePlan):
            assert self._decode is not None
            return self._decode.run(plan, q, k, v, sinks)

        shape, batch, options = self.shape, plan.batch, self._choice.few.arguments()
        scores = Scores(shape.scale, shape.window, shape.soft_cap)
        if plan.max_programs:
            from tessera.kernels.hopper_prefill import hopper_prefill

            pages, causal = (None, False) if self.phase is Phase.VISION else (batch.page_table, shape.causal)
            lens = (batch.cu_q_lens, batch.kv_lens)
            return hopper_prefill(q, k, v, sinks, *lens, pages, plan.tiles, causal, scores, plan.max_programs)
        if self.phase is Phase.VISION:
            return packed_attention(q, k, v, sinks, batch.cu_q_lens, plan.tiles, scores, options)
        where = (batch.cu_q_lens, batch.kv_lens, batch.page_table, plan.tiles)
        return paged_prefill(q, k, v, sinks, *where, shape.causal, scores, options)
