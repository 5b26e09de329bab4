"""The ladder: rungs in the order of their ideas, each against the one before; nobody meets them who did not ask."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from tessera import cli
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.contract import Phase
from tessera.attention.registry import BACKENDS, load_backend
from tessera.bench.kernels import ceilings, ladder
from tessera.bench.kernels import timing as kernel_timing
from tessera.bench.kernels.benchmark import KernelBenchmark
from tessera.bench.kernels.cases import Heads, KernelCase, parse_workload, parts_of
from tessera.bench.kernels.ladder import LADDERS, climb, idea_of, ladder_tables
from tessera.bench.record import Record, read
from tessera.bench.report import ladder as drawn
from tessera.bench.report.drawing import inline_svg
from tessera.bench.report.rows import arrange


class Rung(Naive):
    name: ClassVar[str] = "one_rung"
    rung: ClassVar[str | None] = "an idea"


class Better(Naive):
    name: ClassVar[str] = "better"
    rung: ClassVar[str | None] = "a better idea"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.GEMM_SIZE, "cpu", 64)
    monkeypatch.setitem(ceilings.MOVE_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.SECONDS, "cpu", 0.0)
    monkeypatch.setattr(kernel_timing, "FLUSH_BYTES", 2**16)
    for backend in (Rung, Better):
        monkeypatch.setitem(registry.BACKENDS, backend.name, f"{__name__}:{backend.__name__}")


@pytest.fixture
def climbable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ladder.LADDERS, Phase.DECODE, ("naive", "one_rung", "flash_attn:2", "better"))


def case(workload: str) -> KernelCase:
    (parts,) = parts_of(parse_workload(workload), (Phase.PREFILL, Phase.DECODE))
    return KernelCase(parts, Heads(4, 2, 32), "float32", 16)


@pytest.mark.parametrize("workload", ["q8", "q1s9", "q8_q1s9"])
def test_usable_and_all_have_no_rungs_and_a_name_is_obeyed(workload: str) -> None:
    for word in ("usable", "all"):
        ((_, found),) = KernelBenchmark([case(workload)], backends=word, device="cpu")._program
        names = {name for each in found for name in each.names.values()}
        assert "naive" in names and not [name for name in names if load_backend(name).rung]
    ((_, found),) = KernelBenchmark([case(workload)], backends="one_rung,naive", device="cpu")._program
    assert {each.label for each in found} == {"one_rung", "naive"}


def test_a_ladder_begins_at_the_ground_ends_at_what_serves_and_has_every_rung_between() -> None:
    for phase, names in LADDERS.items():
        assert names[0] == "naive" and names[-1] == "triton"
        assert len({idea_of(name, phase) for name in names}) == len(names)
        assert all(phase in load_backend(name).limits for name in names)
    rungs = {name for name in BACKENDS if name not in (Rung.name, Better.name) and load_backend(name).rung}
    assert rungs == {name for names in LADDERS.values() for name in names[1:-1]}


def rows() -> list[Record]:
    found = list(KernelBenchmark([case("2q1s40")], device="cpu", repeats=2, ladder=True).records())
    return [row for row in found if row.kind == "kernels"]


@pytest.mark.usefixtures("climbable")
def test_each_rung_is_held_against_the_last_that_was_measured_and_against_the_ground() -> None:
    found = rows()
    assert [(row.subject.label, row.status) for row in found] == [
        ("naive", "ok"), ("one_rung", "ok"), ("flash_attn:2", "unavailable"), ("better", "ok"),
    ]  # fmt: skip
    for row, ms in zip(found, (8.0, 4.0, 0.0, 1.0)):
        if row.status == "ok":
            row.metrics["ms_median"] = ms
    steps = climb(found[::-1])  # whatever the order of the rows
    assert [(step.label, step.ms, step.before, step.ground) for step in steps] == [
        ("naive", 8.0, None, 1.0), ("one_rung", 4.0, 2.0, 2.0), ("better", 1.0, 4.0, 8.0),
    ]  # fmt: skip
    (table,) = ladder_tables(found)
    assert table.title == "ladder, decode 2q1s40, heads 4/2/32, float32, pages of 16"
    assert [line[0] for line in table.rows] == ["rung", "naive", "one_rung", "better"]
    assert table.rows[3][1:] == ("1.00", "4.00x", "8.00x", "a better idea")
    assert table.lines[0].startswith("flash_attn:2 unavailable: decode: ")


@pytest.mark.usefixtures("climbable")
def test_without_the_ground_nothing_is_said_about_it() -> None:
    steps = climb([row for row in rows() if row.subject.label != "naive"])
    assert [(step.label, step.ground) for step in steps] == [("one_rung", None), ("better", None)]
    assert steps[0].before is None and steps[1].before


@pytest.mark.usefixtures("climbable")
def test_the_command_prints_the_ladder_and_its_rows_draw_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["bench", "kernels", "--device", "cpu", "--repeats", "2", "--dtypes", "float32", "--out", str(out)]
    assert cli.main([*words, "--ladder", "--phases", "decode"]) == 0
    said = capsys.readouterr().out
    assert "ladder, decode 2q1s150, heads 4/2/32" in said and "x the rung before" in said
    assert said.index("  naive ", said.index("ladder, ")) < said.index("  better ", said.index("ladder, "))
    gathered = arrange(read(out))
    (session,) = gathered.of("kernels")
    (figure,) = drawn.ladder(gathered, session)
    assert [line[-1] for line in figure.table.rows][1:] == ["an idea", "a better idea"]
    (panel,) = figure.panels
    assert "<svg" in inline_svg(panel, figure.name) and "naive" in panel.alt
    assert cli.main([*words, "--backends", "naive", "--phases", "decode"]) == 0
    assert "ladder" not in capsys.readouterr().out


@pytest.mark.usefixtures("climbable")
def test_rows_of_no_ladder_draw_none(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["--backends", "naive", "--workloads", "q1s9", "--heads", "4/2/32", "--device", "cpu", "--repeats", "2"]
    assert cli.main(["bench", "kernels", *words, "--out", str(out)]) == 0
    gathered = arrange(read(out))
    assert drawn.ladder(gathered, gathered.of("kernels")[0]) == []
