"""The sweep's results as tables: plain, Markdown, JSON or YAML; medians over the repeats that did not fail."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.bench.api.load import NUM_PROBES
from tessera.bench.record import Record
from tessera.bench.served.rows import newest

DEFINITIONS = {
    "generation_tok_s": "output tokens of all requests, by the time from the first sending to the last token",
    "prompt_tok_s": "prompt tokens of all requests, by the time from the first sending to the last first token",
    "ttft_ms": "from the sending of a request to its first token; smallest and largest of a level's requests",
    "network_ms": f"median of {NUM_PROBES} GETs to the server's root, on an open connection; not taken off anything",
    "peak_memory_bytes": "peak resident memory of the server's processes so far, loading included",
    "gpu_memory_bytes": "GPU memory that the server's processes hold, its cache's pages included",
}
HEADS = (
    "Concurrency",
    "Generation throughput (tok/s)",
    "Prompt throughput (tok/s)",
    "Min TTFT (s)",
    "Max TTFT (s)",
    "Repeats",
)
"""As the article has them, and how many repeats the medians are of."""


@dataclass(frozen=True)
class Line:
    """What the repeats of one case by one subject come to."""

    rows: Sequence[Record]
    """At least one."""

    @property
    def ok(self) -> list[Record]:
        """Those that did not fail."""
        return [row for row in self.rows if row.status == "ok"]

    @property
    def label(self) -> str:
        """The subject's."""
        return self.rows[0].subject.label

    @property
    def reason(self) -> str:
        """Why some failed; '' where none did."""
        said = dict.fromkeys(row.reason for row in self.rows if row.status != "ok")
        return "; ".join(said)

    def number(self, name: str) -> int:
        """One of the case's numbers."""
        value = self.rows[0].case[name]
        assert isinstance(value, int)
        return value

    def medians(self) -> dict[str, float]:
        """Of each figure that all repeats have; {} where all failed."""
        names = [name for name in (self.ok[0].metrics if self.ok else ()) if all(name in r.metrics for r in self.ok)]
        return {name: statistics.median(row.metrics[name] for row in self.ok) for name in names}

    def cells(self) -> list[str]:
        """As HEADS has them."""
        level, found = str(self.number("concurrency")), self.medians()
        count = f"{len(self.ok)}/{len(self.rows)}"
        if not found:
            return [level, "-", "-", "-", "-", f"{count}: {self.rows[0].status}: {self.reason}"]
        speeds = [f"{found[name]:.2f}{self._range(name)}" for name in ("generation_tok_s", "prompt_tok_s")]
        firsts = [f"{found[name] / 1000:.3f}" for name in ("ttft_ms_min", "ttft_ms_max")]
        return [level, *speeds, *firsts, count + (f": {self.reason}" if self.reason else "")]

    def _range(self, name: str) -> str:
        values = [row.metrics[name] for row in self.ok]
        return f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""


def lines(rows: Sequence[Record]) -> list[Line]:
    """One a subject and case, by length of prompt, then subject, then concurrency."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for row in newest(rows):
        groups.setdefault((row.case_key, row.subject.label), []).append(row)
    labels = list(dict.fromkeys(row.subject.label for row in rows))
    found = [Line(group) for group in groups.values()]

    def place(line: Line) -> tuple[int, int, int]:
        return line.number("input_tokens"), labels.index(line.label), line.number("concurrency")

    return sorted(found, key=place)


def plain(rows: Sequence[Record]) -> list[list[str]]:
    """Rows of a table with a head."""
    heads = ["backend", "input tokens", *(head.lower().replace("ttft", "TTFT") for head in HEADS)]
    return [heads, *([line.label, str(line.number("input_tokens")), *line.cells()] for line in lines(rows))]


def markdown(rows: Sequence[Record]) -> str:
    """A section a length of prompt, in it a table a subject, with what a reader must know above it."""
    first = rows[0]
    parts = ["# API benchmark", "", f"Machine: {first.provenance.machine.name}. Repeat with:", ""]
    parts += ["```console", f"$ {first.provenance.command}", "```", ""]
    sections: dict[tuple[int, str], list[Line]] = {}
    for line in lines(rows):
        sections.setdefault((line.number("input_tokens"), line.label), []).append(line)
    for (num_tokens, label), found in sections.items():
        parts += [f"## {label}, {num_tokens} tokens in", "", *about(found), ""]
        parts += [_row(HEADS), "|" + "---:|" * (len(HEADS) - 1) + "---|", *(_row(line.cells()) for line in found), ""]
    parts += ["Medians, in brackets the range of the repeats; all requests of a level are sent at once.", ""]
    parts += [f"- `{name}`: {text}." for name, text in DEFINITIONS.items()]
    return "\n".join(parts) + "\n"


def about(found: Sequence[Line]) -> list[str]:
    """What stands above the table of one subject and length."""
    rows = [row for line in found for row in line.ok] or [row for line in found for row in line.rows]
    row, caches = rows[0], sorted({row.conditions.cache for row in rows})
    told = [
        ("Input tokens", str(row.case["input_tokens"])),
        ("Output tokens", str(row.case["output_tokens"])),
        ("Test model", row.conditions.model),
        ("Network latency", _median(rows, "network_ms", 1, " ms")),
        ("GPU memory in use", _median(rows, "gpu_memory_bytes", 2**30, " GiB")),
        ("Host memory, peak", _median(rows, "peak_memory_bytes", 2**30, " GiB")),
        ("Prompts", f"{row.case['prompts']}, prefix cache {', '.join(caches)}"),
        ("Attention", ran(row)),
    ]
    return [f"- {name}: {value}" for name, value in told]


def ran(row: Record) -> str:
    """Which backends served, and whether that is proven."""
    served = "; ".join(f"{phase}: {', '.join(names)}" for phase, names in row.subject.resolved.items())
    proven = "proven" if row.subject.proofs else row.subject.note or "nothing ran"
    return f"{served} ({proven})" if served else proven


def results(rows: Sequence[Record]) -> dict[str, Any]:
    """The tables' figures, with where they come from, as plain data."""
    first = rows[0]
    return {
        "benchmark": "api",
        "command": first.provenance.command,
        "commit": first.provenance.commit,
        "machine": first.provenance.machine.name,
        "versions": first.provenance.versions,
        "definitions": DEFINITIONS,
        "results": [_result(line) for line in lines(rows)],
    }


def write_results(path: Path, rows: Sequence[Record]) -> None:
    """As YAML where the name ends so, else as JSON; the folder is made where it is missing."""
    import yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(json.dumps(results(rows), allow_nan=False))  # no two parts are one object, which YAML would show
    text = json.dumps(found, indent=1) if path.suffix == ".json" else yaml.safe_dump(found, sort_keys=False)
    path.write_text(text + "\n", "utf-8")


def _result(line: Line) -> dict[str, Any]:
    row = (line.ok or line.rows)[0]
    return {
        "backend": line.label,
        **row.case,
        "served_by": row.subject.resolved,
        "proven": bool(row.subject.proofs),
        "cache": row.conditions.cache,
        "repeats": len(line.rows),
        "succeeded": len(line.ok),
        "reason": line.reason,
        "medians": line.medians(),
        "each": [row.metrics for row in line.ok],
    }


def _median(rows: Sequence[Record], name: str, unit: float, suffix: str) -> str:
    values = [row.metrics[name] for row in rows if name in row.metrics]
    return f"{statistics.median(values) / unit:.2f}{suffix}" if values else "not seen"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
