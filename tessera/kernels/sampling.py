"""Sampling without sorting the vocabulary: four launches, several programs a row, each row with its own parameters.

1. `peak_kernel`    the largest logit.
2. `weigh_kernel`   relative to it the weights: of rows that are cut by top-k or top-p a histogram of log2 weights, of
                    tokens and of weight; of others each chunk's sum.
3. `list_kernel`    the histogram tells in which bin a row is cut: each chunk's sum of what lies above, a list of what
                    lies in it.
4. `draw_kernel`    the least value that is kept, searched for in the list (see `sampling_finish.py`); then the token.

The least logit that is kept is found exactly, as by sorting. FlashInfer's sampling (arXiv 2501.01005) searches by
pivots over the whole row, and draws anew after each; here one given number decides, for the token is found by
inverting the cumulative distribution in the vocabulary's order. Sums are whole numbers of 2^-40, so no order of adding
changes them: a row has the same token in any batch, and among however many programs it is cut up.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tessera.errors import ConfigError
from tessera.kernels.dependent import launch_constants, pdl_on
from tessera.kernels.launch import Launch, Launcher
from tessera.kernels.sampling_finish import draw_kernel
from tessera.kernels.sampling_kernels import list_kernel, peak_kernel, weigh_kernel
from tessera.kernels.sampling_rows import BINS, CHUNK, MOST_PROGRAMS

BLOCK = 2048
"""Logits that a program of the first three kernels looks at together, and has at least where rows are cut up."""
LOGITS_PER_WARP = 128
"""Of those, how many a warp has."""
REGISTERS = 64
"""Of a thread, at most: two programs of 16 warps have room on a multiprocessor then."""
PROGRAMS_PER_PROCESSOR = 2
"""Programs for each multiprocessor, at most, where rows are cut up."""
FINISH_BLOCK = 2048
"""Listed tokens that the program of `draw_kernel` looks at together."""
FINISH_WARPS = 8
LISTED_TOKENS = 2**21
"""Tokens that the lists of all rows have room for, 8 bytes each, as far as LEAST_ROOM and the vocabulary allow."""
LEAST_ROOM = 8192
"""Tokens that each row's list has room for, at least."""
PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "draw")
"""Columns of the parameters of rows."""


class Workspace(NamedTuple):
    """What the kernels leave for one another; what is in it before does not matter."""

    peaks: Tensor
    """[rows, programs] float32: a program's largest logit"""
    best: Tensor
    """[rows, programs] int32: the lowest token that has it"""
    weights: Tensor
    """[rows, programs] float32: no more than its tokens weigh, relative to it"""
    bounds: Tensor
    """[rows, programs] float32: a logit that the k-th largest is no less than, if all programs' are no less"""
    totals: Tensor
    """[rows, programs] int64: what a program's tokens weigh"""
    counts: Tensor
    """[rows, BINS] int32: tokens of each bin"""
    masses: Tensor
    """[rows, BINS] int64: what they weigh"""
    marks: Tensor
    """[rows, 8] int64: see `sampling_rows.K_BIN` and those after it"""
    sums: Tensor
    """[rows, chunks] int64: what is kept of each chunk"""
    values: Tensor
    """[rows, room] float32: the list's log2 weights"""
    ids: Tensor
    """[rows, room] int32: its tokens"""

    @classmethod
    def allocate(cls, rows: int, size: int, programs: int, room: int, device: torch.device) -> Workspace:
        """Memory for so many rows."""
        bins, chunks = int(BINS), triton.cdiv(size, int(CHUNK))
        shapes = [(programs, torch.float32), (programs, torch.int32), (programs, torch.float32)]
        shapes += [(programs, torch.float32), (programs, torch.int64), (bins, torch.int32), (bins, torch.int64)]
        shapes += [(8, torch.int64), (chunks, torch.int64), (room, torch.float32), (room, torch.int32)]
        return cls(*(torch.empty(rows, columns, dtype=dtype, device=device) for columns, dtype in shapes))


def sample(
    logits: Tensor,
    parameters: Tensor,
    *,
    out: Tensor | None = None,
    pdl: bool | None = None,
    programs_per_row: int | None = None,
    room: int | None = None,
) -> Tensor:
    """One token a row, decided by that row's logits and parameters alone; of equal largest logits the lowest id.

    logits      [rows, vocab] float32, rows contiguous; left as they are. NaN counts as -inf
    parameters  [rows, 5] float64, contiguous, columns as PARAMETERS: temperature, 0 for the most likely token; top_k,
                0 for all; top_p, 1 for all; min_p, 0 for all; draw, in [0, 1) and a multiple of 2^-32
    out         [rows] int64, to be written; None: a new one
    pdl         see `dependent.py`; None: where `pdl_on`
    programs_per_row  programs that share a row, 1 to 128; None: as many as keep the device busy. Any gives the same
    room        tokens that the list of a row has room for; None: see LISTED_TOKENS. Any gives the same
    returns     [rows] int64: `out`

    Tokens equal to the k-th are all kept. Weights below 2^-40 of the largest count as 0. ConfigError for other
    programs_per_row, or where room is less than 1.
    """
    rows, size = logits.shape
    if out is None:
        out = parameters.new_empty(rows, dtype=torch.int64)
    if not rows:
        return out
    programs = _programs_per_row(rows, size, logits.device) if programs_per_row is None else programs_per_row
    room = min(size, max(LEAST_ROOM, LISTED_TOKENS // rows)) if room is None else room
    if not 1 <= programs <= int(MOST_PROGRAMS) or room < 1:
        raise ConfigError(
            f"{programs} programs a row and room for {room} tokens were asked for",
            f"give programs_per_row of 1 to {int(MOST_PROGRAMS)} and room of 1 or more",
        )
    peak, weigh, list_, draw = _compiled(size, pdl_on(logits.device) if pdl is None else pdl)
    w = Workspace.allocate(rows, size, programs, room, logits.device)
    grid, shape = (rows, programs), (logits.stride(0), size, programs)
    peak(grid, logits, parameters, w.peaks, w.best, w.weights, w.bounds, w.counts, w.masses, w.marks, *shape)
    weigh(
        grid, logits, parameters, w.peaks, w.best, w.weights, w.bounds, w.counts, w.masses, w.totals, w.sums, out,
        *shape,
    )  # fmt: skip
    list_(
        grid, logits, parameters, w.peaks, w.counts, w.masses, w.totals, w.marks, w.sums, w.values, w.ids, *shape, room
    )
    draw((rows,), logits, parameters, w.peaks, w.marks, w.sums, w.values, w.ids, out, *shape, room)
    return out


def _programs_per_row(rows: int, size: int, device: torch.device) -> int:
    """As many as keep every multiprocessor busy, with the same number of blocks each."""
    blocks = triton.cdiv(size, BLOCK)
    most = max(1, min(PROGRAMS_PER_PROCESSOR * _processors(device) // rows, int(MOST_PROGRAMS)))
    each: int = triton.cdiv(blocks, most)
    programs: int = triton.cdiv(blocks, each)
    return programs


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def _compiled(size: int, pdl: bool) -> tuple[Launch, Launch, Launch, Launch]:
    chunk = int(CHUNK)
    block = max(chunk, min(BLOCK, triton.next_power_of_2(size)))
    options = {"enable_fp_fusion": False} | launch_constants(pdl)
    shared = {"CHUNKS": block // chunk, "num_warps": block // LOGITS_PER_WARP, "maxnreg": REGISTERS} | options
    sums = triton.next_power_of_2(triton.cdiv(size, chunk))
    last = {"BLOCK": FINISH_BLOCK, "SUMS": sums, "num_warps": FINISH_WARPS} | options
    peak, weigh, list_ = (launch.fixed(**shared) for launch in _LAUNCH_SHARED)
    return peak, weigh, list_, _LAUNCH_DRAW.fixed(**last)


_LAUNCH_SHARED = [Launcher(kernel) for kernel in (peak_kernel, weigh_kernel, list_kernel)]
_LAUNCH_DRAW = Launcher(draw_kernel)
