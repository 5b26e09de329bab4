"""DECODE with our own Triton kernels: `triton`, `triton:paged`, `:flash_decoding` and `:flash_decoding_pp`.

The last three are rungs of a ladder, there to be compared: PagedAttention v1 (arXiv 2309.06180) does not split
sequences, Flash-Decoding cuts each into as many splits, FlashDecoding++ (arXiv 2311.01282) sums parts under one maximum
that is known beforehand. `triton` itself lets the lengths of the batch decide how often each sequence is split. How
they are compiled says `triton_choice.py`; the last three as is shipped, so that what differs is the idea.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tessera.attention.backends.triton_backend import TritonBackend
from tessera.attention.backends.triton_choice import Choice, gpu_name, shipped
from tessera.attention.backends.triton_options import (
    INTERPRETED,
    LEAST_SHARED_MEMORY,
    Options,
    device_resources,
    most_parts,
)
from tessera.attention.calibrate import SAFE_LOG2
from tessera.attention.contract import Batch, Limits, Phase, Shape
from tessera.kernels.scores import Scores

if TYPE_CHECKING:
    from tessera.kernels.decode_merge import Workspace
    from tessera.kernels.decode_shares import Shares

KERNEL, UNIFIED_KERNEL = "paged_decode_kernel", "unified_decode_kernel"
MAX_QUERIES = 16
"""Most new tokens of a sequence."""
ONE_BLOCK = ((32, 528, 2048), (64, 800, 512))
"""(tokens of a block, most programs, most tokens of a sequence) up to which every program has one block: measured on an
H200 with heads of 64 and 128 and two bytes a number."""
MOST_BLOCK_ROWS = 16
"""Rows of a tile, new tokens times heads of a group, up to which that is done."""
LIMITS = Limits(
    # The interpreter of triton 3.9 multiplies bfloat16 wrongly.
    dtypes=(torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16),
    head_dims=(32, 64, 72, 80, 96, 112, 128, 160, 256),
    padded_head_dims=(72, 80, 96, 112, 160),
    groups=range(1, 65),
    devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
    min_capability=(8, 0),
    shared_memory=LEAST_SHARED_MEMORY,
    windows=True,
    soft_caps=True,
    sinks=True,
    bidirectional=True,
    graphs=True,
    # How a sequence is split follows from the others, and how its answer is rounded from that.
    batch_invariant=(),
    max_q_len=MAX_QUERIES,
)


@dataclass(frozen=True)
class DecodePlan:
    """What `run` needs to know about a step; the tensors are the runner's."""

    batch: Batch
    shares: Shares
    """How sequences are cut up."""
    options: Options


class Decode:
    """Plans and launches `paged_decode` for one shape.

    split     whether a sequence may be cut up at all
    balanced  whether lengths decide how often, instead of every sequence being cut up alike; left out: as the options
              say. More sequences than every program can read the lengths of are cut up alike all the same.
    options   how to compile and how many programs to aim for, whatever the batch; left out: as `choice` says
    choice    likewise, for few and for many sequences; left out: as is shipped
    in_blocks whether few short sequences may have a program for each block of tokens (`ONE_BLOCK`), whatever the choice
              says: not where options are to be tried. Options that are given leave no room for it either.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        split: bool = True,
        balanced: bool | None = None,
        options: Options | None = None,
        choice: Choice | None = None,
        in_blocks: bool = True,
    ) -> None:
        # Imported here, not above: Triton takes long to import, and limits are read where it is not installed.
        from tessera.kernels.decode_merge import Workspace

        self.shape, self._split, self._balanced, self._options = shape, split, balanced, options
        chosen = balanced is None and options is None
        small = shape.head_dim <= 128 and shape.dtype != torch.float32 and shape.group <= MOST_BLOCK_ROWS
        self.may_be_in_blocks = in_blocks and split and chosen and small
        """Whether small batches are done so."""
        self._sms, shared_memory = device_resources(shape)
        self._choice = choice or shipped(Phase.DECODE, shape, shared_memory, gpu_name(shape))
        # Parts of fewer rows take less of it, and those of more rows are fewer.
        parts, rows = self._sms * (most_parts(options) if options else self._choice.most_parts), max(16, shape.group)
        self.workspace: Workspace = Workspace.allocate(parts if split else 1, rows, shape.head_dim, shape.device_type)

    def plan(self, batch: Batch) -> DecodePlan:
        """Choose the options and the splits: from how many sequences and queries there are and `max_kv_len` alone."""
        num_seqs = len(batch.kv_lens_cpu)
        found = self._in_blocks(num_seqs, batch)
        if found is not None:
            return found
        options = self._options or self._choice.in_decode(self.shape, self._sms, num_seqs, batch.max_q_len)
        return DecodePlan(batch, self._choose_shares(options, num_seqs, batch), options)

    def run(self, plan: DecodePlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One kernel; it reads lengths and pages from the tensors of the planned batch."""
        from tessera.kernels.paged_decode import paged_decode

        shape, batch = self.shape, plan.batch
        where = (batch.cu_q_lens, batch.kv_lens, batch.page_table, self.workspace, plan.shares)
        scores = Scores(shape.scale, shape.window, shape.soft_cap)
        return paged_decode(q, k, v, sinks, *where, shape.causal, scores, plan.options.arguments())

    def _in_blocks(self, num_seqs: int, batch: Batch) -> DecodePlan | None:
        """A plan for few short sequences: a program for each block of tokens, which reads it before its step begins."""
        from tessera.kernels.decode_shares import share_evenly
        from tessera.kernels.paged_decode import tile_rows

        rows, tiles = tile_rows(self.shape.group, batch.max_q_len, self.shape.dtype)
        if not self.may_be_in_blocks or rows > MOST_BLOCK_ROWS:
            return None
        columns, longest = self.shape.num_kv_heads * tiles, self._longest(batch)
        for block, most_programs, most_tokens in ONE_BLOCK:
            splits = -(-longest // block)
            programs = num_seqs * splits * columns
            if longest <= most_tokens and programs <= min(most_programs, self.workspace.num_parts(rows)):
                shares = share_evenly(num_seqs, splits, block, batch.max_q_len)
                return DecodePlan(batch, replace(shares, one_block=True), Options(0, block, 2, 1, 1, block))
        return None

    def _longest(self, batch: Batch) -> int:
        """Tokens that a sequence's queries see at most."""
        # The kernel rounds queries up to a power of two, and sees a window longer for it.
        queries = 1 << (batch.max_q_len - 1).bit_length()
        longest = batch.max_kv_len
        return max(1, min(longest, self.shape.window + queries - 1 if self.shape.window else longest))

    def _choose_shares(self, options: Options, num_seqs: int, batch: Batch) -> Shares:
        """As many programs as options aim for and memory holds parts of, each of `_least_split` tokens or more."""
        from tessera.kernels.decode_shares import MOST_BALANCED, share_by_length, share_evenly, share_in_runs
        from tessera.kernels.paged_decode import tile_rows

        max_q_len, longest = batch.max_q_len, self._longest(batch)
        rows, tiles = tile_rows(self.shape.group, max_q_len, self.shape.dtype)
        columns, room = self.shape.num_kv_heads * tiles, self.workspace.num_parts(rows)
        min_split = self._least_split(options, num_seqs * columns, longest)
        most = -(-longest // min_split)
        balanced = options.balanced_per_sm > 0 if self._balanced is None else self._balanced
        if self._split and balanced and most > 1 and 1 < num_seqs <= MOST_BALANCED and 2 * columns <= room:
            per_sm = options.balanced_per_sm or options.programs_per_sm
            programs = max(1, min(self._sms * per_sm // columns, room // (2 * columns)))
            in_runs = options.runs and 2 * num_seqs < 3 * programs
            share = share_in_runs if in_runs else share_by_length
            return share(num_seqs, programs, min_split, longest, max_q_len)
        programs = min(self._sms * options.programs_per_sm, room) if self._split else 1
        splits = max(1, min(most, programs // max(1, num_seqs * columns)))
        return share_evenly(num_seqs, splits, min_split, max_q_len)

    def _least_split(self, options: Options, num_columns: int, longest: int) -> int:
        """Fewest tokens a split: as the options say, or fewer, down to one block, while multiprocessors would idle."""
        evenly = -(-longest * num_columns // self._sms)
        return min(options.min_split, -(-evenly // options.block_n) * options.block_n)


class _DecodeRung(TritonBackend[DecodePlan]):
    """A way to decode that `triton` has left behind."""

    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: LIMITS}
    kernel: ClassVar[str] = KERNEL
    """As a profiler sees it."""
    splits: ClassVar[bool] = True
    """Whether sequences are cut up."""

    @classmethod
    def kernel_of(cls, phase: Phase) -> str:
        """Its one kernel."""
        return cls.kernel

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        self._decode = Decode(shape, split=self.splits, balanced=False)

    def plan(self, batch: Batch) -> DecodePlan:
        """Choose the options and the splits: from how many sequences and queries there are and `max_kv_len` alone."""
        return self._decode.plan(batch)

    def _launch(self, plan: DecodePlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return self._decode.run(plan, q, k, v, sinks)


class TritonPaged(_DecodeRung):
    """PagedAttention v1, arXiv 2309.06180: keys straight from pages, one program a sequence and key head."""

    name: ClassVar[str] = "triton:paged"
    rung: ClassVar[str | None] = "PagedAttention: straight from pages, one program a sequence and key head"
    splits: ClassVar[bool] = False


class TritonFlashDecoding(_DecodeRung):
    """Flash-Decoding (Dao et al. 2023): every sequence cut into as many splits as fill the GPU."""

    name: ClassVar[str] = "triton:flash_decoding"
    rung: ClassVar[str | None] = "Flash-Decoding: every sequence in as many splits, merged by log-sum-exp"


class TritonFlashDecodingPP(_DecodeRung):
    """FlashDecoding++, arXiv 2311.01282: one maximum for all rows, parts that miss it computed again exactly.

    unified_max  phi: where scores are expected to peak (`attention/calibrate.py` finds it); any gives right answers,
                 a wrong one computes every part twice. A graph keeps the one that it was captured with.
    """

    name: ClassVar[str] = "triton:flash_decoding_pp"
    rung: ClassVar[str | None] = "FlashDecoding++: one maximum known beforehand, parts merged by plain sums"
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: replace(LIMITS, max_q_len=1)}
    kernel: ClassVar[str] = UNIFIED_KERNEL

    def __init__(self, phase: Phase, shape: Shape, unified_max: float = 0.0) -> None:
        super().__init__(phase, shape)
        self.unified_max = unified_max

    def recomputed(self) -> int:
        """Parts (spans of one key head of one sequence) computed again since it was bound; waits for the device."""
        return int(self._decode.workspace.recomputed.item())

    def _launch(self, plan: DecodePlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        from tessera.kernels.unified_decode import Unified, unified_decode

        batch, shape = plan.batch, self.shape
        where = (batch.kv_lens, batch.page_table, self._decode.workspace, plan.shares)
        unified = Unified(self.unified_max, *SAFE_LOG2[shape.dtype])
        scores = Scores(shape.scale, shape.window, shape.soft_cap)
        return unified_decode(q, k, v, sinks, *where, unified, scores, plan.options.arguments())
