"""Plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.types import AttentionProof, EngineInfo


def render(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> str:
    """Rows in columns as wide as their widest cell; the last column runs on."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(indent + line for line in lines)


def weights_line(info: EngineInfo) -> str:
    """`bfloat16, in steps of few tokens the file's own 4-bit ones in 120 layers`."""
    of_few = f", in steps of few tokens the file's own 4-bit ones in {info.num_four_bit_layers} layers"
    return info.dtype + (of_few if info.num_four_bit_layers else "")


def proof_line(proof: AttentionProof) -> str:
    """`proven: triton ran paged_decode_kernel x30, 12% of a step of 2 x 100`."""
    symbols = ", ".join(f"{use.name:.80} x{use.calls}" for use in proof.symbols[:2])
    share = "alone" if proof.time_share is None else f"{proof.time_share:.0%} of a step of {proof.step}"
    return f"proven: {proof.backend} ran {symbols}, {share}"
