"""Offline throughput: subjects take turns, every fault of one is its own row, and figures are what was measured."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from offline_fakes import benchmark, fake
from tessera import cli
from tessera.bench.benchmark import Done
from tessera.bench.offline import benchmark as offline
from tessera.bench.offline.results import reasons, table, write_results
from tessera.bench.offline.worker_process import WorkerError, WorkerProcess
from tessera.bench.record import Record, read
from tessera.bench.report.rows import arrange
from tessera.bench.report.verdict import verdict


def test_subjects_take_turns_and_the_order_turns_round(tmp_path: Path) -> None:
    rows = list(benchmark([fake(tmp_path, "a"), fake(tmp_path, "b"), fake(tmp_path, "c")]).records())
    assert [row.subject.label for row in rows] == list("abccbaabc")
    assert [row.repeat for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_one_at_a_time_runs_all_repeats_of_one_before_the_next(tmp_path: Path) -> None:
    rows = list(benchmark([fake(tmp_path, "a"), fake(tmp_path, "b")], 2, one_at_a_time=True).records())
    assert [row.subject.label for row in rows] == list("aabb")


def test_figures_follow_from_seconds_and_counted_tokens(tmp_path: Path) -> None:
    (row,) = benchmark([fake(tmp_path, "a")], 1, warmup=2).records()
    found = row.metrics
    assert (found["seconds"], found["req_s"], found["output_tok_s"], found["total_tok_s"]) == (0.5, 4, 12, 32)
    assert found["warmup_seconds"] == 1.0 and row.conditions.warmup == "2 x the same work"
    assert found["latency_ms_p50"] == 500 and found["peak_memory_bytes"] == 1000
    assert row.conditions.cache == "off" and row.conditions.settings["fake"] == "1"
    (row,) = benchmark([fake(tmp_path, "a")], 1, warmup=0).records()
    assert row.conditions.warmup == "none" and row.metrics["warmup_seconds"] == 0


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("outputs[1].pop()", "6 tokens were asked for, 2 with 5 came back"),
        ("outputs.pop()", "1 with 3 came back"),
        ("prompts = prompts[:1]", "10 prompt tokens were sent, 5 were computed"),
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("sys.stderr.write('last words\\n'); sys.stderr.flush(); os._exit(3)", "exit code 3 in run; it wrote: "),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL in run, which is how a system ends a process"),
        ("time.sleep(60)", "run took longer than 2 s"),
    ],
)
def test_a_fault_is_a_failed_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, words: str
) -> None:
    monkeypatch.setattr(offline, "WorkerProcess", _Hasty)
    bad = fake(tmp_path, "bad", run=f"\n        if self.passes == 3:\n            {run}")
    rows = list(benchmark([bad, fake(tmp_path, "good")], 3, pass_timeout=20.0).records())
    assert [row.status for row in rows if row.subject.label == "good"] == ["ok"] * 3
    of_bad = [row for row in rows if row.subject.label == "bad"]
    assert [row.status for row in of_bad] == ["ok", "failed", "failed"]
    assert all(words in row.reason and not row.metrics for row in of_bad[1:]), of_bad[1].reason


def test_a_start_that_fails_gives_failed_rows_with_its_reason(tmp_path: Path) -> None:
    rows = list(benchmark([fake(tmp_path, "bad", load="raise ValueError('bad option')")], 2).records())
    assert [(row.status, row.reason) for row in rows] == [("failed", "ValueError: bad option")] * 2


def test_too_little_memory_for_all_means_one_at_a_time_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holds = f"open({str(tmp_path / 'held')!r}, 'w').close(); import atexit; "
    holds += f"atexit.register(os.remove, {str(tmp_path / 'held')!r})"
    wants = f"\n        if os.path.exists({str(tmp_path / 'held')!r}): raise RuntimeError('CUDA out of memory')"
    caplog.set_level(logging.INFO, "tessera")
    rows = list(benchmark([fake(tmp_path, "a", load=holds), fake(tmp_path, "b", load=wants)], 2).records())
    assert [(row.subject.label, row.status) for row in rows] == [("a", "ok")] * 2 + [("b", "ok")] * 2
    assert "memory does not hold b beside the others" in caplog.text
    assert "loading a\n" in caplog.text and re.search(r"a is loaded and warm after \d+\.\d s", caplog.text)
    assert {row.conditions.settings["order"] for row in rows} == {"one at a time"}


def test_repeats_that_are_complete_are_left_out_and_others_measured_for_all(tmp_path: Path) -> None:
    made = benchmark([fake(tmp_path, "a"), fake(tmp_path, "b")], 2)
    rows = list(made.records())
    assert [(row.subject.label, row.repeat) for row in rows] == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    done = [Done(row.case_key, row.subject.label, row.repeat) for row in rows]
    again = list(benchmark([fake(tmp_path, "a"), fake(tmp_path, "b")], 2).records(done[:3]))
    assert [(row.subject.label, row.repeat) for row in again] == [("b", 1), ("a", 1)]
    assert {row.conditions.settings["order"] for row in again} == {"in turns"}
    cells = table([*rows[:3], *again], ["a", "b"])
    assert [line[0] for line in cells[1:]] == ["a", "b"], "a row that was measured again is neither failed nor counted"
    unused = [fake(tmp_path, name, load=f"open({str(tmp_path / 'started')!r}, 'w')") for name in "ab"]
    assert not list(benchmark(unused, 2).records(done)) and not (tmp_path / "started").exists()


def test_one_that_fails_alone_too_leaves_the_others_side_by_side(tmp_path: Path) -> None:
    """On a GPU the reason of a failure is not known: it may be memory that the others hold, or not."""
    bad = fake(tmp_path, "bad", load="raise RuntimeError('no kernel image')")
    made = benchmark([fake(tmp_path, "a"), bad, fake(tmp_path, "b")], 2)
    made.target = replace(made.target, device="cuda")
    rows = list(made.records())
    assert [row.subject.label for row in rows if row.status == "ok"] == list("abba")
    assert {row.conditions.settings["order"] for row in rows} == {"in turns"}
    assert {row.reason for row in rows if row.status != "ok"} == {"RuntimeError: no kernel image"}


def test_a_library_that_turns_out_to_be_missing_is_unavailable(tmp_path: Path) -> None:
    rows = list(benchmark([fake(tmp_path, "a", load="import no_such_library")], 2).records())
    assert [row.status for row in rows] == ["unavailable"] * 2 and "no_such_library is not installed" in rows[0].reason


def test_a_worker_and_what_it_started_end_with_a_killed_benchmark(tmp_path: Path) -> None:
    """A pipe that closes tells a worker only once its pass has ended."""
    busy = fake(tmp_path, "busy", run=f"open({str(tmp_path / 'runs')!r}, 'w').close(); time.sleep(600)")
    code = "from tessera.bench.offline.worker_process import WorkerProcess"
    code += f"\nworker = WorkerProcess({busy.command}, 600)"
    code += "\nworker.ask('run', prompts=[[1]], output_lens=[1], temperature=0)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    _wait_for(tmp_path / "runs")
    workers = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    assert workers and not psutil.wait_procs(workers, timeout=15)[1]


def test_what_a_worker_started_is_killed_with_it(tmp_path: Path) -> None:
    child = "import subprocess; subprocess.Popen(['sleep', '600'])"
    for run in ("pass", f"open({str(tmp_path / 'runs')!r}, 'w').close(); time.sleep(600)"):
        worker = WorkerProcess(fake(tmp_path, "parent", load=child, run=run).command, 20)
        worker.ask("load", settings={})
        (grandchild,) = psutil.Process(worker.pid).children()
        if run != "pass":
            worker._timeout = 0.5
            with pytest.raises(WorkerError, match="run took longer than"):
                worker.ask("run", prompts=[[1]], output_lens=[1], temperature=0)
        worker.close()
        assert not psutil.wait_procs([grandchild], timeout=10)[1]


class _Hasty(WorkerProcess):
    """A pass is given a tenth of the time: a start needs it all where the machine is busy."""

    def ask(self, op: str, **message: Any) -> dict[str, Any]:
        given = self._timeout
        self._timeout = given / 10 if op == "run" else given
        try:
            return super().ask(op, **message)
        finally:
            self._timeout = given


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


def test_an_idle_worker_does_not_compute_and_ends_with_its_parent(tmp_path: Path) -> None:
    worker = WorkerProcess(fake(tmp_path, "a").command, 30)
    worker.ask("load", settings={})
    process = psutil.Process(worker.pid)
    before = process.cpu_times()
    time.sleep(0.5)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.05
    os.close(worker._process.stdin.fileno())  # type: ignore[union-attr]
    assert process.wait(10) == 0


def test_the_ratio_is_paired_by_repeat_with_its_spread(tmp_path: Path) -> None:
    slow = fake(tmp_path, "slow", run="seconds = [0, 9.0, 1.0, 0.5][self.passes]")
    made = benchmark([fake(tmp_path, "a"), slow, fake(tmp_path, "bad", run="raise ValueError('x')")], 2)
    rows = list(made.records())
    head, first, second = table(rows, made.labels)
    assert first[head.index("against the first")] == "1.00x (1.00..1.00)"
    assert second[head.index("against the first")] == "0.75x (0.50..1.00)"
    assert reasons(rows) == ["bad failed: ValueError: x"]
    write_results(tmp_path / "results.json", rows, made.labels)
    written = json.loads((tmp_path / "results.json").read_text())
    (of_case,) = written["cases"]
    assert [entry["status"] for entry in of_case["subjects"]] == ["ok", "ok", "failed"]
    assert of_case["subjects"][1]["wall_seconds"] == {"warmup": 9.0, "passes": [1.0, 0.5]}
    assert written["provenance"]["versions"]["torch"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[list[Record], str, Path]:
    """(rows, stdout, folder) of one command: a backend twice, one that cannot serve here, and two peers."""
    work = "--num-prompts 3 --input-len 8..12 --output-len 2..4 --temperature 0 --dtype float32 --cpu-threads 1"
    who = "--backends torch_sdpa,torch_sdpa,flashinfer:fa2 --peer hf,vllm --peer-option hf:batch_size=2 --repeats 9"
    model = f"--model {tiny_model} --load-format dummy"
    folder, said = tmp_path_factory.mktemp("offline"), io.StringIO()
    out = folder / "rows.jsonl"
    with contextlib.redirect_stdout(said):
        assert cli.main(["bench", "offline", *work.split(), *who.split(), *model.split(), "--out", str(out)]) == 0
    return read(out), said.getvalue(), folder


def test_real_backends_and_transformers_from_one_command(measured: tuple[list[Record], str, Path]) -> None:
    rows, said, folder = measured
    ours = [row for row in rows if row.subject.label == "torch_sdpa"]
    theirs = [row for row in rows if row.subject.label == "hf"]
    assert [row.status for row in ours + theirs] == ["ok"] * 18
    assert {proof.phase for proof in ours[0].subject.proofs} == {"prefill", "decode"}
    assert theirs[0].conditions.settings["batch_size"] == 2 and "not proven" in theirs[0].subject.note
    assert ours[0].metrics["cached_prompt_tokens"] == ours[1].metrics["cached_prompt_tokens"] == 0
    assert ours[0].conditions.warmup == "1 x the same work" and len(ours[0].samples["latency_ms"]) == 3
    absent = {row.subject.label: row.reason for row in rows if row.status == "unavailable"}
    assert "pip install vllm" in absent["vllm"] and "flashinfer" in absent["flashinfer:fa2"]
    assert len(rows) == 3 * 9 + 2
    assert "torch_sdpa" in said and "vllm unavailable" in said
    (of_case,) = json.loads((folder / "offline_results.json").read_text())["cases"]
    assert of_case["case"]["input_len"] == "8..12"


def test_a_backend_against_itself_is_no_difference(measured: tuple[list[Record], str, Path]) -> None:
    """Two processes, one run of three: by chance one of twenty finds something where there is nothing, a benchmark that
    favours a side finds it always.
    """
    rows = [row for row in measured[0] if row.subject.label.startswith("torch_sdpa")]
    assert {row.subject.label for row in rows} == {"torch_sdpa", "torch_sdpa#2"}
    assert {row.status for row in rows} == {"ok"}
    runs = [[row for row in rows if row.repeat // 3 == number] for number in range(3)]
    said = [" ".join(verdict(arrange(run), None)) for run in runs]
    assert any("no difference" in each or "noise" in each for each in said), said
