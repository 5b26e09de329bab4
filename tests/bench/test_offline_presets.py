"""Several workloads of one command: each subject is started once, and each has its own figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from offline_fakes import fake, presets
from tessera.bench.benchmark import Done
from tessera.bench.offline.results import of_case, write_results


def test_several_workloads_share_one_start_of_each_subject(tmp_path: Path) -> None:
    counts = f"open({str(tmp_path / 'starts')!r}, 'a').write('+')"
    for one_at_a_time in (False, True):
        (tmp_path / "starts").write_text("")
        entrants = [fake(tmp_path, "a", load=counts), fake(tmp_path, "b", load=counts, run="seconds = len(prompts)")]
        made = presets(entrants, "quick,single", 2, one_at_a_time=one_at_a_time, warmup=2)
        rows = list(made.records())
        assert (tmp_path / "starts").read_text() == "++" and len(rows) == made.num_records == 8
        assert {row.case["workload"]: row.metrics["warmup_seconds"] for row in rows if row.subject.label == "b"} == {
            "quick": 16.0,
            "single": 2.0,
        }
        of_single = of_case(rows, made.cases[1])
        assert {(row.case["num_prompts"], row.metrics["output_tok_s"]) for row in of_single} == {(1, 1024), (1, 512)}
        expected = "aabb" if one_at_a_time else "abba"
        assert ["".join(row.subject.label for row in of_case(rows, case)) for case in made.cases] == [expected] * 2
    write_results(tmp_path / "results.json", rows, made.labels)
    written = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert [each["case"]["workload"] for each in written] == ["quick", "single"]
    assert written[0]["subjects"][1]["ratios_to_first"] == [0.0625] * 2


def test_the_engine_has_room_for_the_largest_of_several_workloads() -> None:
    for names in ("single,quick", "quick,single"):
        config = presets([], names, 1).config
        assert (config.model.max_model_len, config.scheduler.max_num_seqs) == (128 + 512, 8)


def test_a_workload_that_is_complete_is_not_measured_again_for_another_that_is_not(tmp_path: Path) -> None:
    entrants = [fake(tmp_path, "a"), replace(fake(tmp_path, "b"), reasons=["no such library"])]
    rows = list(presets(entrants, "quick,single", 2).records())
    told = [(row.case["workload"], row.subject.label, row.status) for row in rows]
    assert told[:2] == [("quick", "b", "unavailable"), ("single", "b", "unavailable")] and len(told) == 6
    done = [Done(row.case_key, row.subject.label, row.repeat) for row in rows[:-1]]
    again = list(presets(entrants, "quick,single", 2).records(done))
    assert [(row.case["workload"], row.repeat) for row in again] == [("single", 1)]
