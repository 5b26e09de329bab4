"""What lm-eval wrote: values with standard errors, single scores, and whether two runs differ by more than noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.bench.quality.table import verdict
from tessera.bench.record import Record
from tessera.errors import TesseraError


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """As in `acc`; `exact_match,strict` where a filter other than none was applied."""
    value: float
    stderr: float | None
    samples: list[float]
    """The metric of every example, by the number of its document; [] where lm-eval keeps none of its own."""
    documents: list[int]

    @property
    def name(self) -> str:
        """As in a row: `tessera_facts acc`."""
        return f"{self.task} {self.metric}"


def read_scores(folder: Path) -> list[Score]:
    """Every score in a folder that `lm_eval --log_samples --output_path` wrote; TesseraError where there is none."""
    found = sorted(folder.rglob("results_*.json"))
    if len(found) != 1:
        raise TesseraError(f"lm-eval left {len(found)} result files in {folder}, not one", "see what it wrote above")
    try:
        tasks = json.loads(found[0].read_text())["results"]
        return [score for task, values in tasks.items() for score in _scores(task, values, found[0].parent)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise TesseraError(
            f"{found[0].name} is not what lm-eval 0.4 writes: {kind}", "use lm-eval 0.4.9 to 0.4.13"
        ) from None


def _scores(task: str, values: dict[str, Any], folder: Path) -> list[Score]:
    rows = _samples(task, folder)
    scores = []
    for name, value in values.items():
        metric, comma, filter_name = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        kept = [row for row in rows if row.get("filter", "none") == filter_name and _is_number(row.get(metric))]
        scores.append(
            Score(
                task,
                metric if filter_name == "none" else name,
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                [float(row[metric]) for row in kept],
                [int(row["doc_id"]) for row in kept],
            )
        )
    return scores


def _samples(task: str, folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"samples_{task}_2*.jsonl"))  # followed by a date: another task may begin alike
    lines = (line for file in files for line in file.read_text().splitlines() if line.strip())
    return sorted((json.loads(line) for line in lines), key=lambda row: int(row["doc_id"]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


HEAD = ("task", "subject", "dtype", "value", "stderr", "examples", "against the first")


def table(rows: Sequence[Record]) -> list[tuple[str, ...]]:
    """Cells, the head first: the subjects of each task and metric side by side, with the paired test of each."""
    done = [row for row in rows if row.status == "ok"]
    names = dict.fromkeys(name for row in done for name in row.samples if not name.startswith("documents "))
    lines: list[tuple[str, ...]] = [HEAD]
    for name in names:
        of_name = [row for row in done if name in row.metrics]
        lines += [_line(name, row, of_name[0]) for row in of_name]
    return lines


def _line(name: str, row: Record, first: Record) -> tuple[str, ...]:
    stderr = row.metrics.get(f"{name} stderr")
    return (
        name,
        row.subject.label,
        row.conditions.dtype,
        f"{row.metrics[name]:.4f}",
        "-" if stderr is None else f"± {stderr:.4f}",
        str(len(row.samples[name])),
        "-" if row is first else comparison(name, row, first),
    )


def comparison(name: str, row: Record, first: Record) -> str:
    """`+0.0417 noise (p=1)`: the difference of the values, and the paired test over the examples both have.

    McNemar's exact test for scores of 0 and 1, else a paired t-test.
    """
    from tessera.bench.quality.metrics import paired_p_value

    change = f"{row.metrics[name] - first.metrics[name]:+.4f}"
    scores = dict(zip(first.samples[f"documents {name}"], first.samples[name]))
    mine = zip(row.samples[f"documents {name}"], row.samples[name])
    pairs = [(score, scores[document]) for document, score in mine if document in scores]
    if not pairs:
        return f"{change} not tested: lm-eval keeps no score of each example"
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    return f"{change} {verdict(paired_p_value(ours, theirs))}" + ("" if ours != theirs else ", all scores equal")


def metrics_of(scores: Sequence[Score]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(metrics, samples) of a row."""
    metrics: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for score in scores:
        metrics[score.name] = score.value
        if score.stderr is not None:
            metrics[f"{score.name} stderr"] = score.stderr
        samples[score.name] = score.samples
        samples[f"documents {score.name}"] = [float(document) for document in score.documents]
    return metrics, samples
