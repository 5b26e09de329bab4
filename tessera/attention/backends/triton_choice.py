"""Which options our Triton kernels are compiled with for a phase and shape, and who says so.

What `tessera tune` found for this very GPU and shape comes before the table of the GPU, and that before the fallback.
None of them looks at a batch but for the number of its sequences in DECODE, so that a graph serves any lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tessera.attention import tune_store
from tessera.attention.backends.triton_options import (
    Gpu,
    Options,
    device_resources,
    head_bytes,
    most_parts,
)
from tessera.attention.backends.triton_tables import FALLBACK, KNOWN, MANY_PER_SM
from tessera.attention.contract import Phase, Shape
from tessera.attention.tune_store import Part


@dataclass(frozen=True)
class Choice:
    """The options of one phase and shape."""

    few: Options
    """In DECODE where sequences alone do not fill the device; elsewhere for every batch."""
    many: Options
    """In DECODE where they do."""
    source: str
    """Who says so, in words."""

    def in_decode(self, shape: Shape, sms: int, num_seqs: int, max_q_len: int = 1) -> Options:
        """For so many sequences, whatever their lengths, so that a graph may be replayed with any."""
        options = self.many if num_seqs >= many_from(shape, sms) else self.few
        # A warp multiplies 16 rows at a time; those of more than one query are more.
        rows = 16 if shape.dtype == torch.float32 else min(64, max_q_len * shape.group)
        num_warps = max(options.num_warps, 1 << (-(-rows // 16) - 1).bit_length())
        return replace(options, num_warps=num_warps, runs=options.runs and num_warps == options.num_warps)

    @property
    def most_parts(self) -> int:
        """The most parts of answers that a multiprocessor's programs leave behind in DECODE."""
        return max(most_parts(self.few), most_parts(self.many))


def choose(phase: Phase, shape: Shape) -> Choice:
    """What was tuned for the device that will run, else what is shipped for it."""
    table = shipped(phase, shape, device_resources(shape)[1], gpu_name(shape))
    found = {part: tune_store.read(phase, part, shape) for part in parts(phase, shape)}
    names = [part for part, result in found.items() if result is not None]
    if not names:
        return table
    few, many = (found.get(part) or found.get(Part.ALL) for part in (Part.FEW, Part.MANY))
    of = "" if len(names) == len(found) else f" with {names[0]}"
    return Choice(
        few.best if few else table.few,
        many.best if many else table.many,
        f"options tuned on this device{of}" + (f", else {table.source}" if of else ""),
    )


def shipped(phase: Phase, shape: Shape, shared_memory: int, gpu: str = "") -> Choice:
    """What the table of a GPU of this name says, or the fallback: by head_dim and dtype alone."""
    known = known_gpu(gpu, shape.capability)
    tables = known.tables if known else FALLBACK
    of_phase = tables.full[phase] if shape.dtype == torch.float32 else tables.half[phase]
    few = next(options for largest, options in of_phase if shape.head_dim <= largest)
    many = few
    if Part.MANY in parts(phase, shape):
        many = next(options for largest, options in tables.many if shape.head_dim <= largest)
    source = f"options shipped for {' and '.join(known.names)}" if known else "options shipped for any GPU"
    row = head_bytes(phase, shape)
    return Choice(few.fitted(row, shared_memory), many.fitted(row, shared_memory), source)


def parts(phase: Phase, shape: Shape) -> tuple[Part, ...]:
    """The parts of a phase that have options of their own: in DECODE few and many sequences, but for float32."""
    if phase is Phase.DECODE and shape.dtype != torch.float32:
        return Part.FEW, Part.MANY
    return (Part.ALL,)


def many_from(shape: Shape, sms: int) -> int:
    """Sequences from which on a batch has `MANY_PER_SM` of them and key heads on each of so many multiprocessors."""
    return -(-MANY_PER_SM * sms // shape.num_kv_heads)


def known_gpu(name: str, capability: tuple[int, int]) -> Gpu | None:
    """The GPU of this name whose options were measured before they were shipped."""
    words = name.replace("-", " ").split()
    return next((gpu for gpu in KNOWN if gpu.capability == capability and any(n in words for n in gpu.names)), None)


def gpu_name(shape: Shape) -> str:
    """What the driver calls the GPU that will run; nothing for a processor."""
    return torch.cuda.get_device_name() if shape.device_type == "cuda" else ""
