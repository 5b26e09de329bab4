"""How the programs of a decode share its sequences out among themselves, on the device, without a kernel before.

Evenly: each sequence is cut into the same number of splits, which leaves those of short ones with nothing to do
and those of the longest late. By length: the blocks of all sequences stand one behind the other and every program has
as many of them as any other, whichever sequences they are of (as Stream-K shares out products, arXiv 2301.03598). It
finds its own by reading the lengths of the whole batch, so that a graph serves any lengths.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
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
    """Fewest tokens a split, so that short sequences are not cut up; where balanced, fewest tokens a program."""
    balanced: bool = False
    """Whether lengths decide how often a sequence is cut, and where."""
    max_q_len: int = 1
    """Most new tokens of a sequence."""
    one_block: bool = False
    """Whether no split is longer than a block of tokens."""

    def capacity(self, num_seqs: int) -> int:
        """Parts that one key head of `num_seqs` sequences may leave behind; 0 where nothing can be split."""
        if self.balanced:
            return 2 * self.num_splits  # a program is in the middle of a sequence where it begins and where it ends
        return self.num_splits * num_seqs if self.num_splits > 1 else 0


def share_evenly(num_splits: int, min_split: int, max_q_len: int = 1) -> Shares:
    """Each sequence is cut into `num_splits`."""
    return Shares(num_splits, min_split, max_q_len=max_q_len)


def share_by_length(num_seqs: int, num_programs: int, min_split: int, longest: int, max_q_len: int = 1) -> Shares:
    """All sequences, none of more than `longest` tokens, are shared out among `num_programs`.

    Or among fewer, where each of them would have less than `min_split` tokens: here as many as could ever be needed,
    of which the lengths decide how many have anything to do.
    """
    most = num_seqs * max(1, -(-longest // min_split))
    return Shares(max(1, min(num_programs, most)), min_split, balanced=True, max_q_len=max_q_len)


def lengths_block(num_seqs: int) -> int:
    """SEQS for so many sequences: few sizes, for each is compiled anew."""
    return next(size for size in (16, 64, 256, MOST_BALANCED) if num_seqs <= size)


@triton.jit
def own_run(
    kv_lens: tl.tensor, num_seqs: tl.tensor, unit: tl.tensor, num_units: tl.tensor, min_split: tl.tensor,
    LONGEST: tl.constexpr, SEQS: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """What program `unit` has of the blocks of all sequences, which are numbered one behind the other.

    LONGEST  tokens that a sequence's queries see at most, 0: all
    returns  begin, end: its blocks, none where they are equal; the first and the last sequence of these, and the block
             that the first begins with; each, more: of the programs that have blocks, see `owner`
    """
    seq = tl.arange(0, SEQS)
    spans = tl.load(kv_lens + seq, mask=seq < num_seqs, other=0)
    blocks = tl.where(seq < num_seqs, num_blocks(spans, LONGEST, BLOCK_N), 0)
    total, ends = tl.sum(blocks, 0), tl.cumsum(blocks, 0)
    units = tl.maximum(tl.minimum(num_units, total // tl.maximum(min_split // BLOCK_N, 1)), 1)
    each, more = total // units, total % units
    begin = tl.where(unit < units, unit * each + tl.minimum(unit, more), total)
    end = tl.where(unit < units, begin + each + (unit < more).to(tl.int32), total)
    first = tl.minimum(tl.sum((ends <= begin).to(tl.int32), 0), num_seqs - 1)
    last = tl.minimum(tl.sum((ends < end).to(tl.int32), 0), num_seqs - 1)
    return begin, end, first, last, tl.sum(tl.where(seq < first, blocks, 0), 0), each, more


@triton.jit
def num_blocks(kv_len: tl.tensor, LONGEST: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Blocks that sequences of so many tokens have in `own_run`; of a padding row one, which writes its zeros."""
    seen = tl.minimum(kv_len, LONGEST) if LONGEST > 0 else kv_len
    return tl.maximum(tl.cdiv(seen, BLOCK_N), 1)


@triton.jit
def owner(block: tl.tensor, each: tl.tensor, more: tl.tensor) -> tl.tensor:
    """The program that has a block: `more` programs have one more than `each`, and they are the first."""
    long = more * (each + 1)
    return tl.where(block < long, block // (each + 1), more + (block - long) // tl.maximum(each, 1))


@triton.jit
def owners(
    seq_block: tl.tensor, seen: tl.tensor, each: tl.tensor, more: tl.tensor, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of a sequence, by its first block and how many tokens of it are seen: its first program, how many it has."""
    first = owner(seq_block, each, more)
    return first, owner(seq_block + tl.maximum(tl.cdiv(seen, BLOCK_N), 1) - 1, each, more) - first + 1


@triton.jit
def new_tokens(
    cu_q_lens: tl.tensor, kv_len: tl.tensor, seq: tl.tensor, QUERIES: tl.constexpr, WINDOW: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Of a sequence: its first query int64, its new tokens, and the oldest token that any of them sees."""
    begin, q_len = seq.to(tl.int64), kv_len * 0 + 1
    if QUERIES > 1:
        begin = tl.load(cu_q_lens + seq).to(tl.int64)
        q_len = tl.load(cu_q_lens + seq + 1) - begin.to(tl.int32)
    oldest = tl.maximum(kv_len - q_len + 1 - WINDOW, 0) if WINDOW > 0 else kv_len * 0
    return begin, q_len, oldest


@triton.jit
def own_split(
    cu_q_lens: tl.tensor, kv_lens: tl.tensor, num_splits: tl.tensor, min_split: tl.tensor, QUERIES: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """What this program of a grid (columns, splits, seqs) has to do, where each sequence is cut up alike.

    returns  sequence int64, split of it, its first query int64, its new tokens, its tokens, the oldest that any of them
             sees, first token of the split, tokens a split, number of its first part. A split past the last has none.
    """
    seq, split = tl.program_id(2), tl.program_id(1)
    kv_len = tl.load(kv_lens + seq)
    begin, q_len, oldest = new_tokens(cu_q_lens, kv_len, seq, QUERIES, WINDOW)
    size = tl.maximum(tl.cdiv(tl.cdiv(kv_len - oldest, num_splits), BLOCK_N) * BLOCK_N, min_split)
    return seq.to(tl.int64), split, begin, q_len, kv_len, oldest, oldest + split * size, size, seq * num_splits
