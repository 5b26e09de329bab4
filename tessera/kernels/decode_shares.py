"""How the programs of a decode share its sequences out among themselves, on the device, without a kernel before.

Evenly: each sequence is cut into the same number of splits, which leaves those of short ones with nothing to do
and those of the longest late. By length: every program reads the lengths of the whole batch and finds its own
share, so that each sequence has as many splits as its length asks for and a graph serves any lengths. In runs: the
same, but all programs have as much to do as any other, and go from one sequence to the next (`decode_runs`).
"""

# ruff: noqa: N803, N806 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

MOST_BALANCED = 1024
"""Sequences of which every program can read all lengths; more are split evenly."""


@dataclass(frozen=True)
class Shares:
    """How a batch is cut up; chosen from how many sequences there are and the longest they may ever be."""

    num_splits: int
    """Programs that share one sequence and key head; where balanced, that share all sequences of one key head."""
    min_split: int
    """Fewest tokens a split, so that short sequences are not cut up."""
    num_units: int
    """Programs launched a key head, of which those that find no share leave at once: at least one a sequence."""
    balanced: bool = False
    """Whether lengths decide how many splits a sequence has."""
    max_q_len: int = 1
    """Most new tokens of a sequence."""
    one_block: bool = False
    """Whether no split is longer than a block of tokens."""
    runs: bool = False
    """Where balanced, whether programs have equal runs of blocks: num_splits programs at most, and so few that each has
    the blocks of min_split tokens."""

    def capacity(self, num_seqs: int) -> int:
        """Parts that one key head of `num_seqs` sequences may leave behind; 0 where nothing can be split."""
        if self.balanced:
            # A run may begin and end within a sequence. Else a sequence of two splits or more is longer than one, so
            # all of them have fewer than twice those aimed at.
            return 2 * self.num_splits
        return self.num_splits * num_seqs if self.num_splits > 1 else 0


def share_evenly(num_seqs: int, num_splits: int, min_split: int, max_q_len: int = 1) -> Shares:
    """Each sequence is cut into `num_splits`."""
    return Shares(num_splits, min_split, num_seqs * num_splits, max_q_len=max_q_len)


def share_by_length(num_seqs: int, num_programs: int, min_split: int, longest: int, max_q_len: int = 1) -> Shares:
    """All sequences, none of more than `longest` tokens, are cut into splits of one size for about `num_programs`.

    Under a window `longest` is `find_share`'s LONGEST or more: of fewer programs some sequences would have none.
    Each sequence adds at most one split that is not full, half of one on average: so fewer full ones are aimed at, lest
    a last few programs begin when all others are over. It also bounds how many programs there can be.
    """
    num_splits = max(1, num_programs - num_seqs // 2, num_programs // 2)
    most = min(num_splits + num_seqs, num_seqs * max(1, -(-longest // min_split)))
    return Shares(num_splits, min_split, most, balanced=True, max_q_len=max_q_len)


def share_in_runs(num_seqs: int, num_programs: int, min_split: int, longest: int, max_q_len: int = 1) -> Shares:
    """All sequences, none of more than `longest` tokens, in equal runs: as many programs as could ever be needed."""
    programs = max(1, min(num_programs, num_seqs * max(1, -(-longest // min_split))))
    return Shares(programs, min_split, programs, balanced=True, max_q_len=max_q_len, runs=True)


def lengths_block(num_seqs: int) -> int:
    """SEQS for so many sequences: few sizes, for each is compiled anew."""
    return next(size for size in (16, 64, 256, MOST_BALANCED) if num_seqs <= size)


@triton.jit
def find_share(
    kv_lens: tl.tensor, num_seqs: tl.tensor, unit: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor,
    LONGEST: tl.constexpr, SEQS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """The share of program `unit`, of all tokens cut into about num_splits splits of no fewer than min_split.

    LONGEST  tokens that a sequence's queries see at most, 0: all
    returns  seq, split of it, its number of splits, number of its first part among those of sequences that are
             split. A program without a share gets a split past the last of the last sequence.
    """
    seq = tl.arange(0, SEQS)
    spans = tl.load(kv_lens + seq, mask=seq < num_seqs, other=0)
    if LONGEST > 0:
        spans = tl.minimum(spans, LONGEST)
    size = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(spans, 0), num_splits), BLOCK_N) * BLOCK_N, min_split)
    # A padding row is one split too, which writes its zeros.
    splits = tl.where(seq < num_seqs, tl.maximum(tl.cdiv(spans, size), 1), 0)
    ends = tl.cumsum(splits, 0)
    own = tl.minimum(tl.sum((ends <= unit).to(tl.int32), 0), num_seqs - 1)
    before = seq < own
    first = tl.sum(tl.where(before, splits, 0), 0)
    first_part = tl.sum(tl.where(before & (splits > 1), splits, 0), 0)
    return own, unit - first, tl.sum(tl.where(seq == own, splits, 0), 0), first_part


@triton.jit
def lengths(
    cu_q_lens: tl.tensor, kv_lens: tl.tensor, seq: tl.tensor, QUERIES: tl.constexpr, WINDOW: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Of a sequence: its tokens, its first query int64, its new tokens, and the oldest token that any of them sees."""
    kv_len = tl.load(kv_lens + seq)
    begin, q_len = seq.to(tl.int64), kv_len * 0 + 1
    if QUERIES > 1:
        begin = tl.load(cu_q_lens + seq).to(tl.int64)
        q_len = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32)
    oldest = tl.maximum(kv_len - q_len + 1 - WINDOW, 0) if WINDOW > 0 else kv_len * 0
    return kv_len, begin, q_len, oldest


@triton.jit
def own_span(
    cu_q_lens: tl.tensor, kv_lens: tl.tensor, num_seqs: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor,
    QUERIES: tl.constexpr, WINDOW: tl.constexpr, SEQS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """What this program of a grid (columns, splits, seqs), or where SEQS > 0 (columns, units), has to do.

    returns  sequence int64, split of it, its first query int64, its new tokens, its tokens, the oldest that any of them
             sees, first token of the split, tokens a split, number of its first part. A split past the last has none.
    """
    if SEQS > 0:
        LONGEST: tl.constexpr = WINDOW + QUERIES - 1 if WINDOW > 0 else 0
        seq, split, own_splits, first_part = find_share(
            kv_lens, num_seqs, tl.program_id(1), num_splits, min_split, LONGEST, SEQS, BLOCK_N
        )
        least = 1
    else:
        seq, split, own_splits, least = tl.program_id(2), tl.program_id(1), num_splits, min_split
        first_part = seq * num_splits
    kv_len, begin, q_len, oldest = lengths(cu_q_lens, kv_lens, seq, QUERIES, WINDOW)
    size = tl.maximum(tl.cdiv(tl.cdiv(kv_len - oldest, own_splits), BLOCK_N) * BLOCK_N, least)
    return seq.to(tl.int64), split, begin, q_len, kv_len, oldest, oldest + split * size, size, first_part
