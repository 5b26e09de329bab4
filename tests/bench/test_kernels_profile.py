"""Into a call: what profilers and compilers tell is read rightly, and what nobody tells is said to be unknown."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tessera import cli
from tessera.attention.contract import Phase
from tessera.bench.kernels import ceilings, ncu, ncu_child
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.cases import Heads, KernelCase, parse_workload, parts_of
from tessera.bench.kernels.ceilings import Ceilings
from tessera.bench.kernels.cost import Cost
from tessera.bench.kernels.ncu import METRICS, Counters, base_name, child_words, count, parse, refusal
from tessera.bench.kernels.occupancy import Multiprocessor, occupancy
from tessera.bench.kernels.profile import CallProfile, KernelProfile, kernels_of, with_counters
from tessera.bench.kernels.profile_tables import NEEDS_GPU, profile_json, profile_tables

HOPPER = Multiprocessor((9, 0), 65536, 233472, 64)
AMPERE = Multiprocessor((8, 6), 65536, 102400, 48)
(PARTS,) = parts_of(parse_workload("2q1s40"), (Phase.DECODE,))
CASE = KernelCase(PARTS, Heads(4, 2, 32), "bfloat16", 16, window=9)
FLASH = "void flash::flash_fwd_kernel<Traits<64, 128>, true>(Params)"
CSV = """==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "paged_decode_kernel": 0%....50%....100% - 8 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",\
"Section Name","Metric Name","Metric Unit","Metric Value"
"""


def line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    where = f'"{number}","4711","python3.12","127.0.0.1","{kernel}","1","7","(64, 1, 1)","(8, 2, 1)","0","9.0"'
    return f'{where},"Command line profiler metrics","{metric}","{unit}","{value}"\n'


def printed() -> str:
    rows = [
        line(number, kernel, METRICS[name], unit, value)
        for number, kernel, occupied, conflicts in (
            (0, "paged_decode_kernel", "40.00", "1,024"),
            (1, "paged_decode_kernel", "60.00", "3,072"),
            (2, FLASH.removeprefix("void "), "25.5", "n/a"),
        )
        for name, unit, value in (
            ("occupancy", "%", occupied),
            ("l1_hits", "%", "12.5"),
            ("l2_hits", "%", "0"),
            ("bank_conflicts", "", conflicts),
        )
    ]
    return CSV + "".join(rows)


def test_what_ncu_prints_is_read_by_kernel_and_averaged_over_launches() -> None:
    assert parse(printed()) == {
        "paged_decode_kernel": Counters(0.5, 0.125, 0.0, 2048.0),
        "flash_fwd_kernel": Counters(0.255, 0.125, 0.0, None),
    }
    assert parse("==PROF== Connected\n") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access", "not permitted here (ERR_NVGPUC"),
        ("==PROF== x\n==ERROR== Failed to load metric foo.", "(exit code 9): ==ERROR== Failed to load metric foo."),
        ("Traceback\nRuntimeError: out of memory\n", "RuntimeError: out of memory"),
        ("==WARNING== No kernels were profiled.\n", "No kernels were profiled"),
        ("", "ncu counted nothing (exit code 9)"),
    ],
)
def test_why_ncu_counted_nothing_is_what_it_said(text: str, said: str) -> None:
    assert said in refusal(text, 9)


def test_without_ncu_the_reason_is_that() -> None:
    environment = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
    assert count("triton", CASE, 0, ["k"], environment) == (
        {}, "ncu, Nsight Compute's command line, is not on PATH",
    )  # fmt: skip


def fake_ncu(folder: Path, body: str) -> dict[str, str]:
    """An environment in which `ncu` is this Python program."""
    program = folder / "ncu"
    program.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": str(folder)}


def test_counters_come_back_by_the_name_that_the_profiler_gave(tmp_path: Path) -> None:
    said = tmp_path / "words.json"
    body = f"import json\njson.dump(sys.argv[1:], open({str(said)!r}, 'w'))\nsys.stdout.write({printed()!r})"
    symbols = [FLASH, "paged_decode_kernel", "another"]
    found, reason = count("flash_attn:2", CASE, 7, symbols, fake_ncu(tmp_path, body))
    assert (set(found), reason) == ({FLASH, "paged_decode_kernel"}, "")
    assert found[FLASH].occupancy == 0.255
    words = json.loads(said.read_text())
    assert words[words.index("--kernel-name") + 1] == "regex:^(flash_fwd_kernel|paged_decode_kernel|another)$"
    assert words[words.index("--metrics") + 1].split(",") == list(METRICS.values())
    assert words[words.index("-m") + 1] == ncu_child.__name__


def test_ncu_that_fails_or_does_not_end_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = fake_ncu(tmp_path, "print('==ERROR== ERR_NVGPUCTRPERM'); sys.exit(1)")
    assert "ERR_NVGPUCTRPERM" in count("triton", CASE, 0, ["k"], refused)[1]
    monkeypatch.setattr(ncu, "SECONDS", 0.3)
    slow = fake_ncu(tmp_path, "import time\ntime.sleep(30)")
    assert count("triton", CASE, 0, ["k"], slow) == ({}, "ncu did not end within 0.3 s")


def test_the_counted_process_is_told_all_that_makes_the_case() -> None:
    args = ncu_child._parser().parse_args(child_words("triton:paged", CASE, 7))
    assert (args.backend, args.phase, args.workload, args.heads) == ("triton:paged", "decode", "2q1s40", "4/2/32")
    assert (args.dtype, args.seed, args.page_size, args.window, args.soft_cap) == ("bfloat16", 7, 16, 9, None)


@pytest.mark.parametrize(
    ("symbol", "base"),
    [
        ("fa1_kernel", "fa1_kernel"),
        (FLASH, "flash_fwd_kernel"),
        ("void cutlass::device_kernel<flash::Sm90<int>>(flash::Params)", "device_kernel"),
        ("at::native::elementwise(int)", "elementwise"),
    ],
)
def test_the_base_name_is_what_ncu_filters_by(symbol: str, base: str) -> None:
    assert base_name(symbol) == base


@pytest.mark.parametrize(
    ("unit", "taken", "share"),
    [
        (HOPPER, (128, 0, 4), 16 / 64),  # 65536 registers / (128 x 32) are 16 warps
        (HOPPER, (32, 0, 4), 64 / 64),  # 16 blocks of 4
        (HOPPER, (32, 0, 1), 32 / 64),  # no more than 32 blocks
        (HOPPER, (64, 100_000, 8), 16 / 64),  # shared memory: 2 blocks of 8
        (HOPPER, (255, 232_448, 8), 8 / 64),
        (HOPPER, (168, 0, 12), 12 / 64),
        (AMPERE, (32, 0, 1), 16 / 48),  # no more than 16 blocks
        (AMPERE, (40, 0, 4), 48 / 48),
        (AMPERE, (32, 102_000, 4), 0.0),  # a kilobyte a block is the system's
    ],
)
def test_theoretical_occupancy_is_what_cudas_calculator_says(
    unit: Multiprocessor, taken: tuple[int, int, int], share: float
) -> None:
    registers, shared_bytes, warps = taken
    found = occupancy(unit, registers=registers, shared_bytes=shared_bytes, warps=warps)
    assert found == pytest.approx(share)


@dataclass
class Variant:
    """As of Triton, compiled."""

    n_regs: int
    n_spills: int
    metadata: Any


@dataclass
class Metadata:
    shared: int


def event(name: str, microseconds: float, **told: Any) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "dur": microseconds, "args": told}


ATTENDS = {"registers per thread": 128, "shared memory": 4096, "block": [64, 2, 1], "est. achieved occupancy %": 12}


def test_kernels_have_their_median_time_a_layer_and_what_their_blocks_take() -> None:
    traces = [
        {"traceEvents": [event("k", spent, **ATTENDS), event("k", spent, **ATTENDS), {"cat": "cpu_op", "name": "x"}]}
        for spent in (10.0, 90.0, 20.0)
    ]
    traces[0]["traceEvents"].append({"cat": "gpu_memcpy", "name": "Memcpy", "dur": 4.0})
    variants = [Variant(128, 6, Metadata(4096)), Variant(64, 0, Metadata(4096))]
    kernel, copy = kernels_of(traces, 2, HOPPER, {"k": variants})
    assert kernel == KernelProfile("k", 1.0, 0.02, 128, 6, 4096, 4, 0.25, 0.12)
    assert copy == KernelProfile("Memcpy", 0.5, 0.002)
    (unknown,) = kernels_of([{"traceEvents": [event("k", 1.0, **ATTENDS)]}], 1, HOPPER, {})
    assert unknown.registers == 128 and unknown.spills is None
    with pytest.raises(RuntimeError, match="saw no kernel"):
        kernels_of([{}], 1, HOPPER, {})


def profile(**changes: Any) -> CallProfile:
    attends = KernelProfile("paged_decode_kernel", 1, 0.8, 128, 0, 4096, 4, 0.25, 0.12)
    merges = KernelProfile("merge_kernel", 1, 0.2, 16, None, 0, 4, 1.0, None, Counters(0.5, 0.125, 0.5, 2048.0))
    given = {"kernels": [attends, merges], "device": "cuda", "no_counters": "ncu is not there"}
    return CallProfile("triton", CASE, Cost(1e9, 1.6e9), Ceilings(4e12, 5e12), **{**given, **changes})


def test_a_table_has_a_line_a_kernel_with_shares_of_the_call_and_of_both_ceilings() -> None:
    head, table = profile_tables([profile()])
    assert not head.rows and table.title == "triton, decode 2q1s40, heads 4/2/32, bfloat16, pages of 16, window 9"
    attends, merges, both = (dict(zip(range(17), line)) for line in table.rows[1:])
    assert [attends[n] for n in range(8)] == ["paged_decode_kernel", "1", "0.800", "80%", "2.00", "50%", "1.25", "25%"]
    assert [attends[n] for n in range(8, 17)] == ["128", "0", "4 KiB", "4", "25%", "~12%", "-", "-", "-"]
    assert [merges[n] for n in range(3, 17)] == [
        "20%", "", "", "", "", "16", "unknown", "0 KiB", "4", "100%", "50%", "12%", "50%", "2,048",
    ]  # fmt: skip
    assert both[2] == "1.00" and both[4] == "1.60"
    assert [len(line) for line in table.rows] == [17] * 4
    told = " ".join(table.lines)
    assert "ncu is not there" in told and "spills unknown" in told and "with ~" in told
    assert json.loads(profile_json(profile()))["kernels"][0]["registers"] == 128


def test_a_call_that_could_not_be_looked_into_says_why() -> None:
    (_, table) = profile_tables([profile(kernels=[], problem="RuntimeError: no CUPTI")])
    assert table.lines == ["nothing was seen: RuntimeError: no CUPTI"] and not table.rows
    assert profile_tables([]) == []


def test_what_was_counted_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"merge_kernel": Counters(0.75)}
    monkeypatch.setattr("tessera.bench.kernels.profile.count", lambda *_: (counted, "why"))
    found = with_counters(profile(), 0)
    assert [each.counters.occupancy for each in found.kernels] == [None, 0.75] and found.no_counters == "why"
    on_cpu = profile(device="cpu")
    assert with_counters(on_cpu, 0) is on_cpu


def test_on_a_cpu_it_says_what_it_needs_and_shows_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**16)
    words = ["bench", "kernels", "--backends", "naive", "--workloads", "q20_2q1s40", "--heads", "4/2/32"]
    words += ["--device", "cpu", "--repeats", "1", "--dtypes", "float32", "--out", str(tmp_path / "rows.jsonl")]
    assert cli.main([*words, "--profile"]) == 0
    said = capsys.readouterr().out
    assert said.count(NEEDS_GPU) == 1
    assert "naive, decode 2q1s40, heads" in said and "naive, prefill q20, heads" in said and "aten::bmm" in said
    assert cli.main([*words, "--profile", "--json"]) == 0
    profiles = [json.loads(each) for each in capsys.readouterr().out.splitlines()]
    profiles = [each for each in profiles if each["kind"] == "kernel profile"]
    assert [each["case"]["phase"] for each in profiles] == ["decode", "prefill"] and profiles[0]["ms"] > 0
    assert cli.main(words) == 0
    assert NEEDS_GPU not in capsys.readouterr().out
