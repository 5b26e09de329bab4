"""Programmatic dependent launch (PDL): a kernel starts, and waits, while the one before it on the stream is at work.

The gap between two kernels of a step, about half a microsecond beside the one or two that many of them take, is then
spent on what needs nothing of the kernel before: the launch itself, addresses, and the first loads of weights.

The rule, for every kernel that is launched so:

1. Every program, or each of its partitions, calls `wait_for_launch` exactly once, before it leaves and before it reads
   or writes anything that a kernel of ours writes in this step: activations, the pages of new tokens, workspaces, its
   own output.
2. Before, it may read weights, and what the step was given: lengths, slots, page tables, rotations, and the keys and
   values of tokens of earlier steps. All of that was written before the last kernel of this step that is launched as
   usual, the embedding or the rotations, and none of ours starts before that one is over; the first kernel of ours
   behind it reads weights alone. Who makes such things and
   launches kernels of ours at once, as a test may, has one launched as usual in between, or synchronises.
3. It lets the next kernel start as soon as it can (`let_next_start`), at the latest where it waits.

Why that is right, whatever the neighbours are. A kernel is over when its programs are, and as each of them waited, the
kernel before it is over by then, and so on: *kernel N is over* implies *all before N are over*, their writes seen.
So behind its wait a kernel finds what it would find without PDL:

- what was written before, by whichever kernel, is there (read after write);
- nobody reads, or writes, any more what it overwrites: a tensor whose memory the allocator hands on, or a workspace
  that layers share (write after read, write after write). A kernel may have started long before that, even while
  several before it are at work, for each lets the next start as it starts itself; but it has touched nothing yet;
- events, copies and kernels launched as usual wait for the end of the kernel before them, and so for all.
  A library's kernel that is launched dependently itself keeps the chain if but one of its programs waits.

Nor can programs that wait be in the way of those they wait for: a kernel is let start only when every program of the
one before has started, so all that a program waits for is on the device already.
"""

# ruff: noqa: N803 -- what Triton compiles in is written in capitals
# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

CAPABILITY = (9, 0)
"""From Hopper on."""


@cache
def pdl_on(device: torch.device) -> bool:
    """Whether a device has programmatic dependent launch, and so whether our kernels take it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def launch_constants(pdl: bool) -> dict[str, bool]:
    """What a kernel that takes PDL is compiled and launched with: its parameter PDL, and the compiler's option."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@triton.jit
def let_next_start(PDL: tl.constexpr) -> None:
    """Where PDL, let the next kernel start: before what may take a while ahead of `wait_for_launch`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers: tl.tensor) -> None:
    """Ask for the lines of 128 bytes in which these lie to come to the second-level cache; on a CUDA device only."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_launch(PDL: tl.constexpr) -> None:
    """Where PDL, let the next kernel start, and wait until those before are over; else nothing. See the rule above."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
