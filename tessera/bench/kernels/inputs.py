"""Inputs of a case, whether they fit the memory, and the answer that every backend is held to on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.attention.contract import Phase, Shape
from tessera.attention.reference import attend_densely
from tessera.attention.timing import COPIES_BYTES, MAX_COPIES, Inputs
from tessera.attention.workloads import TOLERANCE, make_batch
from tessera.bench.kernels.cases import KernelCase, Part

DRAWN = 4_194_301
"""Random numbers that are drawn for a pool and repeated in it; a prime, so that no two pages are alike."""
CHECK_SCORES = 2**24
"""Scores (heads x queries x keys) up to which the whole answer is checked; of more, some queries of some sequences."""
PIECE = 16
"""Queries of each place that is checked then: the first, the middle, the last of a sequence."""
MEMORY_SHARE = 0.8
"""Of what is free, for a case."""


def bytes_needed(case: KernelCase, copies: int) -> int:
    """Memory that a case takes at most: its tensors, keys that one backend gathers, and the answers of a few."""
    itemsize, heads, total = getattr(torch, case.dtype).itemsize, case.heads, 0
    for part in case.parts:
        keys = 2 * sum(_slots(kv_len, case.page_size) * heads.kv for _, kv_len in part.lens)
        total += heads.dim * itemsize * (keys * (copies + 1) + part.tokens * heads.query * (copies + 8))
    return total


def num_copies(part: Part, shape: Shape, *, graph: bool) -> int:
    """How often the tensors are held: in a graph, which runs several times at once, as often as it runs.

    Else twice on a GPU, for the call that warms the host up before a timed one, and once on a CPU; once too where the
    tensors are large.
    """
    most = MAX_COPIES[shape.device_type] if graph else 2 if shape.device_type == "cuda" else 1
    slots = sum(_slots(kv_len, shape.page_size) for _, kv_len in part.lens)
    size = 2 * slots * shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    return max(1, min(most, COPIES_BYTES[shape.device_type] // size))


def make_part_inputs(part: Part, shape: Shape, copies: int, seed: int) -> Inputs:
    """Inputs for the sequences of a part, pages shuffled, all numbers from N(0, 1).

    The pools hold just the pages that are used.
    """
    device = shape.device_type
    shuffle = torch.Generator().manual_seed(seed)
    draw = torch.Generator(device).manual_seed(seed)
    counts = [_slots(kv_len, shape.page_size) // (shape.page_size or 1) for _, kv_len in part.lens]
    size: tuple[int, ...]
    if part.phase is Phase.VISION:
        num_pages, table = 0, torch.zeros(len(part.lens), 0, dtype=torch.int32)
        size = (part.tokens, shape.num_kv_heads, shape.head_dim)
    else:
        assert shape.page_size is not None
        num_pages = sum(counts)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        free = torch.randperm(num_pages, generator=shuffle).int()
        for row, count in zip(table, counts):
            row[:count], free = free[:count], free[count:]
        size = (num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim)
    q_size = (part.tokens, shape.num_q_heads, shape.head_dim)
    tensors = [tuple(_random(one, shape, draw) for one in (q_size, size, size)) for _ in range(copies)]
    return Inputs(shape, make_batch(part.lens, table, num_pages, device), [(q, k, v, None) for q, k, v in tensors])


@dataclass(frozen=True)
class Expected:
    """The oracle's answer in float64 for some or all tokens of a part's first copy."""

    rows: Tensor
    """[checked] int64: tokens of the answer."""
    answer: Tensor
    """[checked, q_heads, head_dim] float64"""
    dtype: torch.dtype
    """Of the kernels, which decides what error is allowed."""

    def errors(self, answer: Tensor) -> tuple[float, float]:
        """The greatest error, and of all tokens the greatest root mean square of the error over that of the answer."""
        error = answer[self.rows].double() - self.answer
        rms, expected = (x.square().mean((-1, -2)).sqrt() for x in (error, self.answer))
        return float(error.abs().amax()), float((rms / expected.clamp(min=1e-30)).amax())

    def problem(self, answer: Tensor, q: Tensor) -> str | None:
        """What is wrong with an answer to `q`, in words; None if nothing is.

        An error is allowed as `tessera verify` allows it, absolute plus relative. Long contexts have answers near 0,
        which any small number is near to, so the same share is allowed of each token's root mean square as well.
        """
        if answer.shape != q.shape or answer.dtype != q.dtype:
            return f"returned {answer.dtype} {tuple(answer.shape)}, not {q.dtype} {tuple(q.shape)}"
        if not answer.isfinite().all():
            return "returned numbers that are not finite"
        tolerance = TOLERANCE[self.dtype]
        greatest, share = self.errors(answer)
        excess = (answer[self.rows].double() - self.answer).abs() - tolerance * (1 + self.answer.abs())
        if excess.amax() > 0:
            return f"error {greatest:.2e} against the reference, allowed are {tolerance:.0e} absolute and relative"
        if share > tolerance:
            return f"error of {share:.2%} of the answer's size (root mean squares), allowed are {tolerance:.2%}"
        return None


def expected_of(part: Part, inputs: Inputs) -> Expected:
    """The oracle's answer: for all tokens where that is affordable, else for a few of each kind of sequence."""
    shape = inputs.shape
    q, k, v, _ = inputs.copies[0]
    rows, answers = [], []
    for row, start, stop in _pieces(part, shape):
        q_len, kv_len = part.lens[row]
        first = sum(length for length, _ in part.lens[:row])
        keys, values = _tokens(inputs, row, first, kv_len, k), _tokens(inputs, row, first, kv_len, v)
        seen = kv_len - q_len + stop if shape.causal else kv_len
        queries = q[first + start : first + stop].double()
        answers.append(attend_densely(shape, queries, keys[:seen].double(), values[:seen].double()))
        rows.append(torch.arange(first + start, first + stop, device=q.device))
    return Expected(torch.cat(rows), torch.cat(answers), shape.dtype)


def _pieces(part: Part, shape: Shape) -> Iterator[tuple[int, int, int]]:
    """Which sequence, and from which to which of its queries."""
    scores = shape.num_q_heads * sum(q_len * kv_len for q_len, kv_len in part.lens)
    if scores <= CHECK_SCORES:
        for row, (q_len, _) in enumerate(part.lens):
            yield from ((row, start, min(start + 256, q_len)) for start in range(0, q_len, 256))
        return
    first = 0
    for group in part.groups:
        for row in sorted({first, first + group.count // 2, first + group.count - 1}):
            starts = {0, max(0, (group.q_len - PIECE) // 2), max(0, group.q_len - PIECE)}
            yield from ((row, start, min(start + PIECE, group.q_len)) for start in sorted(starts))
        first += group.count


def _tokens(inputs: Inputs, row: int, first: int, kv_len: int, pool: Tensor) -> Tensor:
    """[kv_len, kv_heads, head_dim]: a sequence's own, out of its pages."""
    if inputs.shape.page_size is None:
        return pool[first : first + kv_len]
    pages = inputs.batch.page_table[row, : -(-kv_len // inputs.shape.page_size)].long()
    return pool[pages].flatten(0, 1)[:kv_len]


def _slots(kv_len: int, page_size: int | None) -> int:
    """Places that a sequence takes, in whole pages."""
    return kv_len if page_size is None else -(-kv_len // page_size) * page_size


def _random(size: tuple[int, ...], shape: Shape, generator: torch.Generator) -> Tensor:
    """Numbers of N(0, 1); the first `DRAWN` are drawn and repeat: drawing all would take longer than timing."""
    count = 1
    for length in size:
        count *= length
    drawn = torch.randn(min(count, DRAWN), dtype=torch.float32, device=shape.device_type, generator=generator)
    drawn = drawn.to(shape.dtype)
    return (drawn if count <= DRAWN else drawn.repeat(-(-count // DRAWN))[:count]).view(size)
