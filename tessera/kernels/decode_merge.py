"""What programs of a decode that share a sequence leave behind, and how the last of them merges it (Dao et al. 2023).

Each program writes its part down, then counts itself as arrived; whichever arrives last merges all parts by
log-sum-exp, so that no second kernel is launched. Scores are in units of log2.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessera.kernels.packed import store_part


@dataclass(frozen=True)
class Workspace:
    """Memory for the parts of sequences that are split; the arrivals are all 0 between launches."""

    part_out: Tensor
    """[numbers] float32, cut into parts of [rows, head_dim] by each launch as it needs"""
    part_lse: Tensor
    """[numbers / head_dim] float32, cut into parts of [rows]; of `unified_decode` the sums of weights"""
    part_peak: Tensor
    """Likewise, of `unified_decode` alone: what the weights are relative to."""
    arrivals: Tensor
    """[numbers / head_dim] int32, of which one a sequence and key head is used"""
    recomputed: Tensor
    """[1] int64: parts that were computed again, exactly, since it was allocated; see `unified_decode`"""

    @classmethod
    def allocate(cls, parts: int, rows: int, head_dim: int, device: str) -> Workspace:
        """Room for so many parts of so many rows; parts of fewer rows, and so more of them, may be stored too."""
        return cls(
            torch.empty(parts * rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(parts * rows, dtype=torch.float32, device=device),
            torch.empty(parts * rows, dtype=torch.float32, device=device),
            torch.zeros(parts * rows, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    def num_parts(self, rows: int) -> int:
        """How many parts of so many rows there is room for."""
        return len(self.part_lse) // rows


@triton.jit
def out_rows(row: tl.tensor, heads: tl.tensor, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr) -> tl.tensor:
    """Where rows lie in a contiguous output [queries, heads, GROUP, HEAD_DIM], from a sequence's first query on.

    row  (query, head of the group), heads fastest
    """
    return ((row // GROUP) * heads * GROUP + row % GROUP) * HEAD_DIM


@triton.jit
def _merge_parts(
    out: tl.tensor, heads: tl.tensor, num_rows: tl.tensor, first_row: tl.tensor, part_out: tl.tensor,
    part_lse: tl.tensor, first_part: tl.tensor, count: tl.tensor,
    GROUP: tl.constexpr, PART_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Merge parts first_part .. first_part + count by log-sum-exp into out, PARTS at a time."""
    row, dim = tl.arange(0, MERGE_ROWS), tl.arange(0, HEAD_PAD)
    peak = tl.full([MERGE_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([MERGE_ROWS], tl.float32)
    acc = tl.zeros([MERGE_ROWS, HEAD_PAD], tl.float32)
    for begin in range(0, count, PARTS):
        part = begin + tl.arange(0, PARTS)
        at = (first_part + part)[None, :] * PART_ROWS + row[:, None]
        real = (part < count)[None, :] & (row < num_rows)[:, None]
        # .cg: read from L2, where the other programs' results are; L1 may hold what stood here before.
        lse = tl.load(part_lse + at, mask=real, other=float("-inf"), cache_modifier=".cg")
        where = at[:, :, None] * HEAD_DIM + dim[None, None, :]
        mask = real[:, :, None] & (dim < HEAD_DIM)[None, None, :]
        values = tl.load(part_out + where, mask=mask, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(lse, 1))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(lse - new_peak[:, None])
        acc = acc * shrink[:, None] + tl.sum(values * weights[:, :, None], 1)
        total = total * shrink + tl.sum(weights, 1)
        peak = new_peak
    merged = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    rows = out_rows(first_row + row, heads, GROUP, HEAD_DIM)
    store_part(out, merged, rows, row < num_rows, 0, HEAD_PAD, HEAD_DIM)


@triton.jit
def finish_part(
    values: tl.tensor, lse: tl.tensor, part: tl.tensor, first_part: tl.tensor, num_parts: tl.tensor,
    arrived: tl.tensor, out: tl.tensor, heads: tl.tensor, num_rows: tl.tensor, first_row: tl.tensor,
    part_out: tl.tensor, part_lse: tl.tensor,
    GROUP: tl.constexpr, PART_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Write one part down, and merge them all if the others have been written; one alone is the answer.

    values     [ROWS, HEAD_PAD], divided; lse [ROWS]; of both num_rows are real
    arrived    the counter that this sequence's programs share
    out        at the sequence's first query and this key head, whose rows from first_row on these are
    """
    row = tl.arange(0, ROWS)
    if num_parts <= 1:
        rows = out_rows(first_row + row, heads, GROUP, HEAD_DIM)
        store_part(out, values, rows, row < num_rows, 0, HEAD_PAD, HEAD_DIM)
    else:
        written = part_out + part * (PART_ROWS * HEAD_DIM)
        store_part(written, values, row * HEAD_DIM, row < num_rows, 0, HEAD_PAD, HEAD_DIM)
        tl.store(part_lse + part * PART_ROWS + row, lse, mask=row < num_rows)
        tl.debug_barrier()  # every thread's share is written before this program says that it arrived
        if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
            tl.store(arrived, 0)
            _merge_parts(
                out, heads, num_rows, first_row, part_out, part_lse, first_part, num_parts,
                GROUP, PART_ROWS, HEAD_DIM, HEAD_PAD, MERGE_ROWS, PARTS,
            )  # fmt: skip
