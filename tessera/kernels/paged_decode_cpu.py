"""Flash-Decoding over pages on a CPU, compiled by Numba: keys and values are read once, where they lie.

Each sequence is cut into chunks of `CHUNK` keys, whose partial answers are merged by their
log-sum-exp (Flash-Decoding, Dao et al. 2023). The cuts depend on the sequence alone, so its answer
has the same bits whatever else is in the batch and however many threads there are.

bfloat16 comes in as uint16, the same bits: shifted up by 16 they are those of a float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

CHUNK = 256
"""Keys whose scores are held at once, for all heads: with 64 query heads they still fit a core's cache."""

# Sums may be taken in another order, so that they use vector registers; NaN and infinity keep their meaning.
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}
_LOG2E = np.float32(1.4426950408889634)
# 2**f on [-0.5, 0.5]: ln(2)**k / k!, with an error below half a unit in the last place of a float32.
_P0, _P1, _P2, _P3, _P4, _P5, _P6, _P7 = (
    np.float32(np.log(2.0) ** k / float(np.prod(np.arange(1, k + 1, dtype=np.float64)))) for k in range(8)
)


@cache
def compile_paged_decode(head_dim: int, group: int) -> Callable[..., None]:
    """The kernel for heads of `head_dim`, `group` query heads a key-value head.

    Both are constants in it, since loops of unknown length took three times as long. Numba compiles it at the
    first call for a type of pages, some seconds, and keeps the result on disk. It takes, float32 unless said:

    q             [seqs, q_heads, head_dim]
    k_pages       [pages, page_size, kv_heads, head_dim] float32, or bfloat16 seen as uint16; v_pages alike
    page_table    [seqs, pages] int32
    chunks        [chunks, 3] int64: sequence, first key, last key + 1; those of a sequence together, none empty
    parts         [threads + 1] int64: where each thread's chunks begin
    first_chunks  [seqs + 1] int64: where each sequence's chunks begin; a sequence without any gets zeros
    scale         of q·k
    soft_cap      0 for none
    sinks         [q_heads], or [0] for none
    workspace     as `make_workspace` makes it
    out           [seqs, q_heads, head_dim], written
    """
    load = _compile_load(head_dim)
    score, accumulate = _compile_score(head_dim, group, load), _compile_accumulate(head_dim, group, load)

    @numba.njit(fastmath=_FLAGS, parallel=True, cache=True)
    def paged_decode(
        q: Any, k_pages: Any, v_pages: Any, page_table: Any, chunks: Any, parts: Any, first_chunks: Any,
        scale: Any, soft_cap: Any, sinks: Any, workspace: Any, out: Any,
    ) -> None:  # fmt: skip
        answers, highest, total, all_scores, rows, bits = workspace
        for part in numba.prange(len(parts) - 1):
            for chunk in range(parts[part], parts[part + 1]):
                seq, first, last = chunks[chunk]
                scores = all_scores[part, :, : last - first]
                score(q[seq], k_pages, page_table[seq], first, scale, soft_cap, scores, rows[part])
                for head in range(scores.shape[0]):
                    highest[chunk, head] = _largest(scores[head])
                    total[chunk, head] = _exponentiate(scores[head], highest[chunk, head], bits[part])
                accumulate(scores, v_pages, page_table[seq], first, answers[chunk], rows[part])
        for seq in numba.prange(len(q)):
            own = slice(first_chunks[seq], first_chunks[seq + 1])
            _merge(answers[own], highest[own], total[own], sinks, out[seq])

    compiled: Callable[..., None] = paged_decode
    return compiled


def _compile_load(head_dim: int) -> Any:
    """Copies one head of one token into `row`, widened to float32; `bits` is the same memory."""

    @numba.njit(fastmath=_FLAGS, inline="always")
    def load(source: Any, row: Any, bits: Any) -> None:
        if source.itemsize == 2:
            for d in range(head_dim):
                bits[d] = np.uint32(source[d]) << np.uint32(16)
        else:
            for d in range(head_dim):
                row[d] = source[d]

    return load


def _compile_score(head_dim: int, group: int, load: Any) -> Any:
    """Products of the queries with as many keys as `scores` [q_heads, keys] has columns, from `first` on."""

    @numba.njit(fastmath=_FLAGS)
    def score(q: Any, pages: Any, table: Any, first: Any, scale: Any, soft_cap: Any, scores: Any, row: Any) -> None:
        bits, page_size = row.view(np.uint32), pages.shape[1]
        for i in range(scores.shape[1]):
            page, offset = table[(first + i) // page_size], (first + i) % page_size
            for kv_head in range(pages.shape[2]):
                load(pages[page, offset, kv_head], row, bits)
                for member in range(group):
                    product = np.float32(0.0)
                    for d in range(head_dim):
                        product += q[kv_head * group + member, d] * row[d]
                    scores[kv_head * group + member, i] = product * scale
        if soft_cap > 0:
            for head in range(scores.shape[0]):
                for i in range(scores.shape[1]):
                    scores[head, i] = soft_cap * np.tanh(scores[head, i] / soft_cap)

    return score


def _compile_accumulate(head_dim: int, group: int, load: Any) -> Any:
    """Sum of the values from `first` on, weighted by `weights` [q_heads, keys], into `answer`."""

    @numba.njit(fastmath=_FLAGS)
    def accumulate(weights: Any, pages: Any, table: Any, first: Any, answer: Any, row: Any) -> None:
        bits, page_size = row.view(np.uint32), pages.shape[1]
        answer[:] = np.float32(0.0)
        for i in range(weights.shape[1]):
            page, offset = table[(first + i) // page_size], (first + i) % page_size
            for kv_head in range(pages.shape[2]):
                load(pages[page, offset, kv_head], row, bits)
                for member in range(group):
                    weight = weights[kv_head * group + member, i]
                    for d in range(head_dim):
                        answer[kv_head * group + member, d] += weight * row[d]

    return accumulate


@numba.njit(fastmath=_FLAGS)
def _largest(scores: Any) -> Any:
    largest = scores[0]
    for i in range(1, scores.shape[0]):
        largest = max(largest, scores[i])
    return largest


@numba.njit(fastmath=_FLAGS)
def _exponentiate(scores: Any, highest: Any, bits: Any) -> Any:
    """Scores become exp(score - highest), in place; returns their sum. No call, so that it is vectorised."""
    powers = bits.view(np.float32)
    for i in range(scores.shape[0]):
        exponent = max((scores[i] - highest) * _LOG2E, np.float32(-126.0))
        whole = np.floor(exponent + np.float32(0.5))
        f = exponent - whole
        scores[i] = _P0 + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * (_P5 + f * (_P6 + f * _P7))))))
        bits[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    total = np.float32(0.0)
    for i in range(scores.shape[0]):
        scores[i] *= powers[i]
        total += scores[i]
    return total


@numba.njit(fastmath=_FLAGS)
def _merge(answers: Any, highest: Any, total: Any, sinks: Any, out: Any) -> None:
    """Chunks of one sequence into its answer, zeros if there are none; `sinks` is empty where there are none."""
    if answers.shape[0] == 0:
        out[:] = np.float32(0.0)
        return
    for head in range(out.shape[0]):
        peak = sinks[head] if sinks.shape[0] else highest[0, head]
        for chunk in range(answers.shape[0]):
            peak = max(peak, highest[chunk, head])
        weight_sum = np.exp(sinks[head] - peak) if sinks.shape[0] else np.float32(0.0)
        out[head, :] = np.float32(0.0)
        for chunk in range(answers.shape[0]):
            weight = np.exp(highest[chunk, head] - peak)
            weight_sum += weight * total[chunk, head]
            for d in range(out.shape[1]):
                out[head, d] += weight * answers[chunk, head, d]
        for d in range(out.shape[1]):
            out[head, d] /= weight_sum


def make_workspace(
    num_chunks: int, num_threads: int, num_q_heads: int, head_dim: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Memory that the kernel writes for itself, for up to `num_chunks` chunks."""
    return (
        np.empty((num_chunks, num_q_heads, head_dim), np.float32),
        np.empty((num_chunks, num_q_heads), np.float32),
        np.empty((num_chunks, num_q_heads), np.float32),
        np.empty((num_threads, num_q_heads, CHUNK), np.float32),
        np.empty((num_threads, head_dim), np.float32),
        np.empty((num_threads, CHUNK), np.int32),
    )


def cut_into_chunks(first_keys: list[int], kv_lens: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`chunks` and `first_chunks` of sequences whose keys `first_keys` to `kv_lens` are seen."""
    chunks, first_chunks = [], [0]
    for seq, (begin, end) in enumerate(zip(first_keys, kv_lens)):
        chunks += [(seq, first, min(first + CHUNK, end)) for first in range(begin, end, CHUNK)]
        first_chunks.append(len(chunks))
    return np.array(chunks, np.int64).reshape(-1, 3), np.array(first_chunks, np.int64)


def share_among_threads(chunks: NDArray[np.int64], num_threads: int) -> NDArray[np.int64]:
    """`parts`: the chunks in as many runs as there are threads, of about as many keys each."""
    ends = np.concatenate([[0], np.cumsum(chunks[:, 2] - chunks[:, 1])])
    wanted = ends[-1] * np.arange(num_threads + 1) / num_threads
    nearest: NDArray[np.int64] = np.searchsorted((ends[1:] + ends[:-1]) / 2, wanted).astype(np.int64)
    return nearest
