"""`tessera bench kernels` as a user meets it: tables or JSON on stdout, rows on disk, refusals in a sentence."""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import cli
from tessera.attention.contract import Phase
from tessera.bench.kernels import ceilings
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.benchmark import KernelBenchmark
from tessera.bench.kernels.cases import Heads, KernelCase, Part, parse_workload
from tessera.bench.kernels.ceilings import Measurement, ceiling_records
from tessera.bench.kernels.tables import tables
from tessera.bench.kernels.words import kernel_name
from tessera.bench.provenance import provenance
from tessera.bench.record import Conditions, Record, Subject, Value, read
from tessera.log import logger
from tessera.types import AttentionProof, KernelUse

SMALL = ("--workloads", "2q32,q20_2q1s40", "--repeats", "2", "--device", "cpu", "--dtypes", "float32")


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings have a test of their own."""
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 128)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**22)


def test_tables_are_printed_and_rows_appended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["bench", "kernels", "--backends", "naive,torch_sdpa:flash,triton", *SMALL, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["tessera", *words])
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "prefill 2q32, heads 9/3/64, float32, pages of 16, bound by" in said
    assert "decode+prefill 2q1s40_q20, heads 9/3/64" in said
    assert "4/6 runs succeeded" in said and "in 2 cases: triton unavailable: device cpu not in ('cuda',)" in said
    assert "flash_attention_for_cpu" in said and "of ceiling" in said
    assert f"rows appended to {out}" in said
    rows = read(out)
    assert [row.kind for row in rows] == ["ceiling"] * 3 + ["kernels"] * 6
    assert all(row.provenance.command == f"tessera {' '.join(words)}" for row in rows)
    assert {row.conditions.seed for row in rows} == {0}


def test_json_is_one_object_a_row_and_a_failed_row_is_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KernelBenchmark._problems.__globals__, "MEMORY_SHARE", 0.0)
    code = cli.main(
        ["bench", "kernels", "--json", "--backends", "naive", *SMALL, "--out", str(tmp_path / "rows.jsonl")]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 1
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"] * 2
    assert rows[-1]["case"]["workload"] == "2q1s40_q20" and "MemoryError" in rows[-1]["reason"]


def test_where_no_backend_that_was_named_can_run_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "rows.jsonl")
    assert cli.main(["bench", "kernels", "--backends", "triton", *SMALL, "--out", out]) == 1
    assert "0/2 runs succeeded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--backends", "auto"], "auto is no attention backend"),
        (["--workloads", "2q"], "workload '2q' is not a batch"),
        (["--heads", "3"], "--heads has '3'"),
        (["--dtypes", "int8"], "--dtypes has 'int8'"),
        (["--phases", "encode"], "--phases has 'encode'"),
        (["--page-size", "0"], "page_size must be a whole number from 1 to 4096, got 0"),
        (["--window", "0"], "window must be"),
        (["--soft-cap", "0"], "soft_cap must be"),
        (["--repeats", "0"], "repeats must be"),
        (["--seed", "-1"], "seed must be"),
        (["--preset", "all"], "invalid choice: 'all'"),
        (["--out", "rows.txt"], "--out rows.txt does not end in .jsonl"),
        (["--out", "/proc/none/rows.jsonl", "--model", "/nowhere"], "--out /proc/none/rows.jsonl cannot be written"),
        (["--attention", "naive"], "unknown flag '--attention'"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--ladder", "--backends", "naive"], "--ladder and --backends naive both say what is compared"),
        (["--ladder", "--workloads", "q8_q1s9", "--heads", "4/2/32"], "a ladder has one phase"),
        (["--graph"], "--graph asks for CUDA graphs"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_with_a_hint(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "kernels", "--device", "cpu", *args]) == (1 if args[0] == "--model" else 2)
    captured = capsys.readouterr()
    assert said in captured.err and "hint: " in captured.err and not captured.out


def row(label: str, ms: float, workload: str = "q64") -> Record:
    """As measured; `ms` 0 for a failed one."""
    (proof,) = [AttentionProof("prefill", label, None, [KernelUse("aten::bmm", 1, 1.0)], None, "1 x 64", {}, "cpu")]
    case: dict[str, Value] = {"phase": "prefill", "workload": workload, "heads": "4/2/32", "dtype": "float32"}
    case |= {"mode": "engine", "page_size": 16}
    if not ms:
        return Record("kernels", case, Subject(label), "failed", Conditions(), provenance("test"), reason="no tile")
    metrics = {"ms_median": ms, "ms_std": 0.1, "tok_s": 5.0, "tflop_s": 1.0, "tb_s": 0.5, "ceiling_share": 0.25}
    return Record(
        "kernels",
        case,
        Subject(label, asked={"prefill": label}, resolved={"prefill": [label]}, proofs=[proof]),
        "ok",
        Conditions(settings={"bound": "compute", "timed_as": "eager"}),
        provenance("test"),
        metrics=metrics | {"plan_ms": 0.1},
    )


def test_the_fastest_stands_first_and_the_summary_counts_wins_ratios_and_failures() -> None:
    rows = [row("a", 4.0), row("b", 2.0), row("c", 0), row("a", 3.0, "q128"), row("b", 12.0, "q128")]
    first, second, summary, outcome = tables(rows)
    assert [line[0] for line in first.rows] == ["backend", "b", "a"] and first.lines == ["c failed: no tile"]
    assert [line[0] for line in second.rows] == ["backend", "a", "b"]
    assert first.rows[1][1:6] == ("2.00 ± 0.100", "5", "1.00", "500", "25.0%") and first.rows[0][4] == "GB/s"
    assert summary.rows[1:] == [
        ("a", "1", "1.41", "2 of 2"),  # sqrt(2 x 1)
        ("b", "1", "2.00", "2 of 2"),  # sqrt(1 x 4)
        ("c", "0", "-", "0 of 1"),
    ]
    assert outcome.title == "4/5 runs succeeded"
    assert outcome.lines == ["in prefill q64 4/2/32 float32: c failed: no tile"]


def test_times_of_the_device_stand_beside_the_others_where_there_are_some() -> None:
    timed = row("a", 4.0)
    on_gpu = replace(timed, metrics=timed.metrics | {"device_ms_median": 3.0})
    first, *_ = tables([on_gpu])
    assert first.rows[0][:4] == ("backend", "ms", "device ms", "tok/s")
    assert first.rows[1][1:4] == ("4.00 ± 0.100", "3.00", "5")
    assert "device ms" not in tables([timed])[0].rows[0]


def test_whom_one_reason_keeps_out_stand_in_one_line_and_no_reason_is_lost() -> None:
    def out(label: str, reason: str, phase: str = "prefill") -> Record:
        case, subject = row(label, 1.0).case | {"phase": phase}, Subject(label, asked={phase: label})
        return Record("kernels", case, subject, "unavailable", Conditions(), provenance("test"), reason=reason)

    rows = [out("x", "prefill: no GPU"), out("y", "prefill: no GPU"), out("z", "prefill: not there; prefill: no GPU")]
    rows += [out("x", "decode: no GPU", "decode"), out("y", "decode: no decode kernel", "decode"), row("a", 1.0)]
    *_, outcome = found = tables(rows)
    assert found[0].lines == ["unavailable, reasons at the end: x, y, z"]
    assert outcome.lines == [
        "in 2 cases: x, y unavailable: no GPU",
        "in prefill q64 4/2/32 float32: z unavailable: not there; no GPU",
        "in decode q64 4/2/32 float32: y unavailable: no decode kernel",
    ]


def test_what_the_machine_can_do_stands_above() -> None:
    measured = [Measurement("read", "float32", 44e9, [1000.0]), Measurement("gemm", "bfloat16", 9e11, [1000.0])]
    (table, _) = tables(list(ceiling_records(measured, "cpu", provenance("test"))))
    assert table.title.endswith("measured: read 44.0 GB/s, product of matrices in bfloat16 0.9 TFLOP/s")


@pytest.mark.parametrize(
    ("symbol", "short"),
    [
        ("aten::bmm", "aten::bmm"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Traits<64, 128>, true>(Params)", "flash_fwd_kernel"),
        (
            "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::Mainloop<2>>>>(P)",
            "FlashAttnFwdSm90",
        ),
        ("paged_decode_kernel", "paged_decode_kernel"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7",
            "cudnn_generated_fort_n..h_fprop_wgmma_f16_knob_7",
        ),
    ],
)
def test_a_kernels_short_name_still_tells_whose_it_is(symbol: str, short: str) -> None:
    assert kernel_name(symbol) == short


def test_a_graph_is_refused_by_name_where_a_backend_allows_none() -> None:
    part = Part(Phase.DECODE, parse_workload("2q1s40"))
    case = KernelCase((part,), Heads(4, 2, 32), "float32", 16, mode="graph")
    benchmark = KernelBenchmark([case], backends="naive", device="cpu")
    row = list(benchmark.records())[-1]
    assert (row.status, row.reason) == ("unavailable", "decode: allows no CUDA graph, and --graph asks for one")


def test_the_threads_that_are_asked_for_compute_and_are_recorded(tmp_path: Path) -> None:
    out, before = tmp_path / "rows.jsonl", torch.get_num_threads()
    try:
        flags = ["--cpu-threads", "1", "--seed", "3", "--repeats", "1", "--workloads", "q1s20", "--device", "cpu"]
        assert cli.main(["bench", "kernels", "--backends", "naive", *flags, "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(before)
    (found,) = (row for row in read(out) if row.kind == "kernels")
    assert found.conditions.settings["threads"] == 1 and found.conditions.seed == 3
    assert len(found.samples["ms"]) == 1


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [
        ([], [], logging.INFO),
        (["--log-level", "debug"], [], logging.DEBUG),
        ([], ["--log-level", "error"], logging.ERROR),
        (["--log-level", "debug"], ["--log-level", "error"], logging.ERROR),
    ],
)
def test_the_log_level_counts_before_and_after_the_benchmarks_name(
    before: list[str], after: list[str], level: int, tmp_path: Path
) -> None:
    flags = ["--backends", "auto", "--out", str(tmp_path / "rows.jsonl")]  # refused once the level is set
    try:
        assert cli.main(["bench", *before, "kernels", *after, *flags]) == 2
        assert logger.level == level
    finally:
        logger.setLevel(logging.INFO)


def proven(**changes: Any) -> Subject:
    """`naive`, asked for prefill, that ran and was seen."""
    proof = AttentionProof("prefill", "naive", None, [KernelUse("aten::bmm", 1, 1.0)], None, "q64", {}, "cpu")
    subject = Subject("naive", asked={"prefill": "naive"}, resolved={"prefill": ["naive"]}, proofs=[proof])
    return replace(subject, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"proofs": [replace(proven().proofs[0], symbols=[])]}, "the proof of prefill names no kernel"),
        ({"asked": {"prefill": "naive", "decode": "naive"}}, "asked for decode, and nothing is known to have served"),
        ({"asked": {"decode": "auto"}}, "asked for decode, and nothing is known to have served"),
        ({"proofs": []}, "proven was []"),
        ({"asked": {"prefill": "triton"}}, "prefill was asked of triton and served by"),
    ],
)
def test_a_row_without_a_proof_of_all_that_was_asked_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    assert Record("kernels", {}, proven(), "ok", Conditions(), provenance("test")).status == "ok"
    with pytest.raises(ValueError, match=re.escape(said)):
        Record("kernels", {}, proven(**changes), "ok", Conditions(), provenance("test"))
