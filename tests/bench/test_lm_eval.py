"""lm-eval's results are read as it wrote them, and through our server a task scores as with transformers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tessera.bench.provenance import provenance
from tessera.bench.quality.lm_eval_results import comparison, metrics_of, read_scores, table
from tessera.bench.record import Conditions, Record, Subject, read
from tessera.errors import TesseraError

SAMPLE = Path(__file__).parent / "lm_eval_sample"
"""What lm-eval 0.4.13 wrote for the task in lm_eval_task, through our server; of the results, the keys that count."""
TASK = Path(__file__).parent / "lm_eval_task"


def row(label: str) -> Record:
    metrics, samples = metrics_of(read_scores(SAMPLE))
    subject = Subject(label, engine="hf", note="a test")
    return Record("quality", {}, subject, "ok", Conditions(dtype="float32"), provenance("a test"), 0, metrics, samples)


def test_values_errors_and_single_scores_are_those_of_lm_eval() -> None:
    scores = {score.name: score for score in read_scores(SAMPLE)}
    assert scores.keys() == {"tessera_facts acc", "tessera_facts acc_norm"}
    found = scores["tessera_facts acc"]
    assert found.value == pytest.approx(0.7083333) and found.stderr == pytest.approx(0.0947760)
    assert found.documents == list(range(24)) and sum(found.samples) / 24 == pytest.approx(found.value)


def test_equal_scores_are_noise_and_many_changes_in_one_direction_are_not() -> None:
    first, name = row("first"), "tessera_facts acc"
    assert comparison(name, row("second"), first) == "+0.0000 noise (p=1), all scores equal"
    worse = replace(first, samples=first.samples | {name: [0.0] * 24}, metrics=first.metrics | {name: 0.0})
    assert comparison(name, worse, first) == "-0.7083 differs (p=1.5e-05)"
    flipped = [1 - score if n == 0 else score for n, score in enumerate(first.samples[name])]
    one = replace(first, samples=first.samples | {name: flipped}, metrics=first.metrics | {name: sum(flipped) / 24})
    assert "noise (p=1)" in comparison(name, one, first)


def test_subjects_stand_side_by_side() -> None:
    head, first, second, *_ = table([row("a"), row("b")])
    assert first[: head.index("examples") + 1] == ("tessera_facts acc", "a", "float32", "0.7083", "± 0.0948", "24")
    assert first[-1] == "-" and second[-1].startswith("+0.0000 noise")


def test_no_result_or_a_strange_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TesseraError, match="left 0 result files"):
        read_scores(tmp_path)
    (tmp_path / "results_x.json").write_text('{"results": [1]}')
    with pytest.raises(TesseraError, match="is not what lm-eval"):
        read_scores(tmp_path)


def test_a_task_begins_with_the_name_of_another_and_is_not_mixed_up(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "copy")
    (tmp_path / "copy" / "samples_tessera_facts_more_2026-01-01.jsonl").write_text('{"doc_id": 99, "acc": 1.0}\n')
    assert all(len(score.samples) == 24 for score in read_scores(tmp_path / "copy"))


@pytest.mark.slow
def test_a_loglikelihood_task_scores_through_our_server_as_with_transformers(tmp_path: Path) -> None:
    """Needs lm-eval: set LM_EVAL_PYTHON to the Python that has it, where it is not this one."""
    python, out = os.environ.get("LM_EVAL_PYTHON", sys.executable), tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tessera.cli", "bench", "quality", "--lm-eval", "tessera_facts"]
    command += ["--lm-eval-path", str(TASK), "--lm-eval-python", python, "--lm-eval-transformers", "--out", str(out)]
    command += ["--backends", "naive,torch_sdpa", "--dtypes", "float32", "--max-model-len", "512"]
    subprocess.run(command, check=True)
    rows = {row.subject.label: row for row in read(out)}
    assert {row.status for row in rows.values()} == {"ok"}
    for label in ("naive", "torch_sdpa"):
        assert rows[label].metrics == rows["hf"].metrics
        assert rows[label].samples == rows["hf"].samples
