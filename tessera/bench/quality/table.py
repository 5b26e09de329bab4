"""The table of `tessera bench quality`."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.bench.record import Record

HEAD = ("dtype", "backend", "KL mean", "KL max", "logit error", "led", "free", "answers", "perplexity", "vs float32")
NOISE = 0.05
"""A difference less unlikely than this is called noise."""


def table(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    """Cells, the head first; one line a row with figures."""
    return [HEAD, *(_line(row) for row in rows if row.status == "ok")]


def verdict(p_value: float) -> str:
    """`noise (p=0.31)` or `differs (p=0.004)`."""
    word = "noise" if p_value >= NOISE else "differs"
    return f"{word} (p={p_value:.2g})"


def _line(row: Record) -> tuple[str, ...]:
    found = row.metrics
    change = found["perplexity"] / found["perplexity_reference"] - 1
    return (
        row.conditions.dtype,
        row.subject.label,
        f"{found['kl_mean']:.2e}",
        f"{found['kl_max']:.2e}",
        f"{found['max_logit_error']:.4f}",
        f"{found['greedy_agreement_led']:.1%}",
        f"{found['greedy_agreement_free']:.1%}",
        f"{found['equal_answers']:.1%}",
        f"{found['perplexity']:.4f}",
        f"{change:+.3%}" + (f" {verdict(found['nll_p_value'])}" if "nll_p_value" in found else ""),
    )
