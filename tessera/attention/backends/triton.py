"""triton: tessera's own kernels, FlashAttention-2 and Flash-Decoding straight from pages.

They serve every feature of the contract. How they are compiled stands in the tables below: the winners of
docs/results/2026-11-21-h200-triton-prototypes.md where a shape was measured there, else what fits. Nothing is
tuned at run time. On a Hopper GPU prompts go to a kernel made for it (`uses_hopper_kernel`). With
TRITON_INTERPRET=1 in the environment the others run on a CPU too, slowly, to be tested.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape, import_error
from tessera.kernels.scores import Scores

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in its interpreter: it decides when a kernel is defined, so this never changes."""
KERNELS = {Phase.PREFILL: "paged_prefill_kernel", Phase.DECODE: "paged_decode_kernel", Phase.VISION: "packed_kernel"}
HOPPER_KERNEL = "hopper_prefill_kernel"
LONG_TILE = 4096
"""Keys that a tile of queries sees on average from which on every tile has a program of its own: where tiles take long
the hardware evens out what they take, where they are short it pays to begin the next before one is over."""
LEAST_SHARED_MEMORY = 99 << 10
"""Bytes that a block may ask for on every GPU since Ampere; all options fit into it."""
INTERPRETED_SMS = 32
"""Multiprocessors that the interpreter is taken to have, so that decode is split there too."""

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
    batch_invariant=("cuda", "cpu"),
)
# How a sequence is split follows from how many there are, and how its answer is rounded from that.
_DECODE = replace(_PREFILL, padded_head_dims=(72, 80, 96, 112, 160), graphs=True, batch_invariant=())


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled; stages are lowered and tiles of keys halved until they fit shared memory."""

    block_m: int
    """Rows a tile, each a query and a head of a group; 0 in DECODE, where the group decides."""
    block_n: int
    """Tokens a tile."""
    num_warps: int
    num_stages: int
    """Tiles of keys and values on their way at a time."""
    programs_per_sm: int = 0
    """DECODE: programs to aim for on a multiprocessor."""
    min_split: int = 0
    """DECODE: fewest tokens a split."""

    def fitted(self, head_bytes: int, shared_memory: int) -> Options:
        """As much of these options as a block has memory for, where a row of a tile takes `head_bytes`."""
        room = shared_memory - self.block_m * head_bytes
        stages = min(self.num_stages, room // (2 * self.block_n * head_bytes))
        if stages >= 2 or self.block_n == 16:
            return replace(self, num_stages=max(1, stages))
        return replace(self, block_n=self.block_n // 2).fitted(head_bytes, shared_memory)

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        rows = {"BLOCK_M": self.block_m} if self.block_m else {}
        return rows | {"BLOCK_N": self.block_n, "NUM_STAGES": self.num_stages, "num_warps": self.num_warps}


_Table = tuple[tuple[int, Options], ...]
"""(largest head_dim, options), ascending."""
HALF: dict[Phase, _Table] = {
    Phase.PREFILL: (
        (64, Options(64, 64, 4, 3)),
        (128, Options(128, 64, 8, 3)),
        (160, Options(64, 64, 4, 3)),
        (256, Options(64, 32, 4, 3)),
    ),
    Phase.DECODE: (
        (64, Options(0, 32, 1, 5, programs_per_sm=4, min_split=128)),
        (128, Options(0, 64, 2, 5, programs_per_sm=2, min_split=256)),
        (256, Options(0, 32, 4, 5, programs_per_sm=2, min_split=256)),
    ),
    Phase.VISION: (
        (64, Options(128, 64, 8, 3)),
        (80, Options(128, 64, 4, 3)),
        (128, Options(128, 64, 8, 3)),
        (160, Options(64, 64, 4, 3)),
        (256, Options(64, 32, 4, 3)),
    ),
}
"""Two bytes a number."""
_FULL_ROWS: _Table = (
    (64, Options(64, 32, 8, 2)),
    (96, Options(32, 32, 8, 2)),
    (128, Options(32, 16, 8, 2)),
    (256, Options(16, 16, 4, 2)),
)
FULL: dict[Phase, _Table] = {
    Phase.PREFILL: _FULL_ROWS,
    Phase.DECODE: ((256, Options(0, 32, 8, 3, programs_per_sm=2, min_split=256)),),
    Phase.VISION: _FULL_ROWS,
}
"""float32: multiplied without tensor cores, which would round it."""


def choose_options(phase: Phase, shape: Shape, shared_memory: int) -> Options:
    """How to compile for a shape: by head_dim and dtype alone, so that no answer depends on the batch."""
    table = FULL if shape.dtype == torch.float32 else HALF
    options = next(options for largest, options in table[phase] if shape.head_dim <= largest)
    return options.fitted(_stored_head_dim(phase, shape.head_dim) * shape.dtype.itemsize, shared_memory)


def uses_hopper_kernel(phase: Phase, shape: Shape) -> bool:
    """Whether a shape's prompts are served by `hopper_prefill.py`: by the shape alone, as `choose_options`."""
    # Smaller heads it can serve too, but its launch takes the host longer than most of their prompts take the device.
    fits = shape.head_dim in (128, 256) and shape.page_size in (16, 32, 64, 128, 256)
    half = shape.dtype in (torch.bfloat16, torch.float16)
    if phase is not Phase.PREFILL or shape.capability[0] != 9 or not (fits and half):
        return False
    return import_error("tessera.kernels.hopper_prefill") is None  # Gluon is new, and moves with Triton's versions


@dataclass(frozen=True)
class TritonPlan:
    """What `run` needs to know about a step; the tensors are the runner's, but for the tiles."""

    batch: Batch
    tiles: Tensor | None = None
    """[n, 2] int32: (sequence, tile of its rows), longest first; None in DECODE."""
    num_splits: int = 1
    """DECODE: programs that share one sequence and key head."""
    max_programs: int = 0
    """Of the Hopper kernel."""


class Triton(AttentionBackend[TritonPlan]):
    """Serves every shape on a GPU with kernels of our own."""

    name: ClassVar[str] = "triton"
    needs: ClassVar[tuple[str, ...]] = ("triton",)
    packages: ClassVar[tuple[str, ...]] = ("triton", "torch")
    install: ClassVar[str | None] = "pip install triton"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.PREFILL: _PREFILL, Phase.DECODE: _DECODE, Phase.VISION: _PREFILL}

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The kernel of the phase, and nobody else's attention."""
        if shape.device_type == "cpu":
            return Claim(must=("triton_interpreted",))
        kernel = HOPPER_KERNEL if uses_hopper_kernel(phase, shape) else KERNELS[phase]
        return Claim(must=(f"^{kernel}",), must_not=("(?i)pytorch_flash|cudnn|fmha|flash_fwd",))

    def __init__(self, phase: Phase, shape: Shape) -> None:
        # Imported here, not above: Triton takes long to import, and limits are read where it is not installed.
        from tessera.kernels.paged_decode import Workspace

        super().__init__(phase, shape)
        sms, shared_memory = _device_resources(shape)
        self._options = choose_options(phase, shape, shared_memory)
        self._sms, self._hopper = sms, uses_hopper_kernel(phase, shape)
        # Sequences are split only as long as there are no more programs than this.
        self._programs = max(1, sms * self._options.programs_per_sm)
        parts = self._programs if phase is Phase.DECODE else 1
        self._workspace = Workspace.allocate(parts, shape.group, shape.head_dim, shape.device_type)

    def plan(self, batch: Batch) -> TritonPlan:
        """List the tiles, or in DECODE choose the splits, from the number of sequences and `max_kv_len` alone."""
        if self.phase is Phase.DECODE:
            return TritonPlan(batch, num_splits=self._choose_splits(len(batch.kv_lens_cpu), batch.max_kv_len))
        if not self._hopper:
            return TritonPlan(batch, self._list_tiles(batch, self._options.block_m))
        from tessera.kernels.hopper_prefill import ROWS

        tiles = self._list_tiles(batch, ROWS)
        long = sum(batch.kv_lens_cpu) >= LONG_TILE * len(batch.kv_lens_cpu)
        return TritonPlan(batch, tiles, max_programs=len(tiles) * self.shape.num_kv_heads if long else self._sms)

    def run(self, plan: TritonPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One kernel; it reads lengths and pages from the tensors of the planned batch."""
        if not INTERPRETED or self.shape.device_type != "cpu":
            return self._launch(plan, q, k, v, sinks)
        with torch.profiler.record_function(f"triton_interpreted::{KERNELS[self.phase]}"):
            return self._launch(plan, q, k, v, sinks)

    def _launch(self, plan: TritonPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        from tessera.kernels.packed import packed_attention
        from tessera.kernels.paged_decode import paged_decode
        from tessera.kernels.paged_prefill import paged_prefill

        shape, batch, options = self.shape, plan.batch, self._options.arguments()
        scores = Scores(shape.scale, shape.window, shape.soft_cap)
        if plan.tiles is None:
            work = (self._workspace, plan.num_splits, self._options.min_split)
            return paged_decode(q, k, v, sinks, batch.kv_lens, batch.page_table, *work, scores, options)
        if self.phase is Phase.VISION:
            return packed_attention(q, k, v, sinks, batch.cu_q_lens, plan.tiles, scores, options)
        where = (batch.cu_q_lens, batch.kv_lens, batch.page_table, plan.tiles)
        if self._hopper:
            from tessera.kernels.hopper_prefill import hopper_prefill

            return hopper_prefill(q, k, v, sinks, *where, shape.causal, scores, plan.max_programs)
        return paged_prefill(q, k, v, sinks, *where, shape.causal, scores, options)

    def _choose_splits(self, num_seqs: int, max_kv_len: int) -> int:
        """As many programs as the device runs at once, of no fewer tokens than a split may have."""
        longest = min(max_kv_len, self.shape.window or max_kv_len)
        most = -(-longest // self._options.min_split)
        return max(1, min(most, self._programs // max(1, num_seqs * self.shape.num_kv_heads)))

    def _list_tiles(self, batch: Batch, block: int) -> Tensor:
        """Every tile of `block` rows, those that see the most keys first: nobody waits for a late long one."""
        q_lens, group = torch.tensor(batch.q_lens_cpu), self.shape.group
        counts = (q_lens * group + block - 1) // block
        seqs = torch.repeat_interleave(torch.arange(len(counts)), counts)
        tiles = torch.arange(len(seqs)) - (counts.cumsum(0) - counts)[seqs]
        num_keys = torch.tensor(batch.kv_lens_cpu)[seqs]
        if self.shape.causal:
            num_keys += torch.minimum((tiles + 1) * block // group - q_lens[seqs], torch.tensor(0))
        order = num_keys.argsort(descending=True, stable=True)
        both = torch.stack((seqs, tiles), 1)[order].int()
        return both.to(batch.cu_q_lens.device, non_blocking=True)


def _stored_head_dim(phase: Phase, head_dim: int) -> int:
    """Numbers that a row takes in shared memory: a power of two in DECODE, elsewhere at most two of them."""
    from tessera.kernels.packed import head_parts

    return 1 << (head_dim - 1).bit_length() if phase is Phase.DECODE else sum(head_parts(head_dim))


def _device_resources(shape: Shape) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block may ask for) of the device that will run."""
    if shape.device_type != "cuda":
        return INTERPRETED_SMS, LEAST_SHARED_MEMORY
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    allowed = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY)
    return properties.multi_processor_count, shape.shared_memory or allowed
