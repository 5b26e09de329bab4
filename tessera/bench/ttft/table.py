"""First-token latency as a table: a line a model and length, the bars by what was proven to run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from tessera.bench.record import Record
from tessera.bench.served.rows import newest
from tessera.bench.ttft.bars import bar_in_words

WIDTH = 24
"""Characters of the longest bar."""


def table(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    """Median over the repeats that did not fail, their range, prompt tokens out of the cache, and a bar to scale.

    Bars of one model and length have one scale.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in newest(rows):
        groups.setdefault((row.case_key, row.subject.label), []).append(row)
    medians = {key: _median(group) for key, group in groups.items()}
    found: list[tuple[str, ...]] = [("model", "prompt", "first token", "TTFT (ms)", "range", "cached", "repeats", "")]
    for key in _ordered(groups):
        group, median = groups[key], medians[key]
        ok = [row for row in group if row.status == "ok"]
        first = (ok or group)[0]
        names = (str(first.case["model"]), str(first.case["prompt_tokens"]), bar_in_words(first))
        count = f"{len(ok)}/{len(group)}"
        if median is None:
            found.append((*names, "-", "-", "-", count, f"{first.status}: {first.reason}"))
            continue
        times = [row.metrics["ttft_ms"] for row in ok]
        longest = max(each for (case, _), each in medians.items() if case == key[0] and each is not None)
        drawn = "#" * max(1, round(WIDTH * median / longest))
        spread = f"{min(times):.2f}-{max(times):.2f}"
        failed = "; ".join(dict.fromkeys(row.reason for row in group if row.status != "ok"))
        found.append((*names, f"{median:.2f}", spread, _cached(ok), count, drawn + (f" {failed}" if failed else "")))
    return found


def _ordered(groups: dict[tuple[str, str], list[Record]]) -> list[tuple[str, str]]:
    """By model and length as they first came, in it the bars as the first repeat had them."""
    models = list(dict.fromkeys(str(group[0].case["model"]) for group in groups.values()))
    labels = list(dict.fromkeys(label for _, label in groups))

    def place(key: tuple[str, str]) -> tuple[int, int, int]:
        case = groups[key][0].case
        return models.index(str(case["model"])), int(str(case["prompt_tokens"])), labels.index(key[1])

    return sorted(groups, key=place)


def _median(group: Sequence[Record]) -> float | None:
    times = [row.metrics["ttft_ms"] for row in group if row.status == "ok"]
    return statistics.median(times) if times else None


def _cached(ok: Sequence[Record]) -> str:
    """Share of the prompts' tokens that came out of the cache."""
    shares = [
        row.metrics["cached_prompt_tokens"] / (int(str(row.case["prompt_tokens"])) * len(row.samples["ttft_ms"]))
        for row in ok
        if "cached_prompt_tokens" in row.metrics
    ]
    return f"{statistics.median(shares):.0%}" if shares else ""
