"""`tessera bench report` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthetic_rows import offline, where
from tessera.bench.record import append
from tessera.cli import main


def test_the_command_writes_page_markdown_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").mkdir()
    append(tmp_path / "rows" / "offline.jsonl", offline({"naive": 3000, "triton": 4000}))
    words = [
        str(tmp_path / "rows"),
        "--out",
        str(tmp_path / "x" / "page.html"),
        "--markdown",
        str(tmp_path / "page.md"),
    ]
    words += ["--figures", str(tmp_path / "figures"), "--title", "Two backends", "--baseline", "triton"]
    assert main(["bench", "report", *words]) == 0
    assert capsys.readouterr().out.startswith("triton is 1.3")
    assert "<title>Two backends</title>" in (tmp_path / "x" / "page.html").read_text()
    text = (tmp_path / "page.md").read_text()
    assert (
        text.startswith("# Two backends")
        and "(figures/offline-throughput.svg)" in text
        and "better than triton" in text
    )
    assert (tmp_path / "figures" / "offline-throughput.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "offline-throughput.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["missing.jsonl"], "there is no result file"),
        (["rows.jsonl", "--out", "page.txt"], "does not end in .html"),
        (["rows.jsonl", "--markdown", "page.html"], "does not end in .md"),
        (["rows.jsonl", "--figures", "rows.jsonl"], "is a file"),
        (["rows.jsonl", "--baseline", "nobody"], "no row with figures has this label"),
        (["missing.jsonl", "--out", "/proc/none/page.html"], "--out /proc/none/page.html cannot be written"),
        (["missing.jsonl", "--out", "rows.jsonl/page.html"], "cannot be written: rows.jsonl is a file"),
        (["missing.jsonl", "--out", "folder.html"], "--out folder.html is a folder"),
        (["missing.jsonl", "--markdown", "/proc/none.md"], "--markdown /proc/none.md cannot be written"),
        (["missing.jsonl", "--figures", "/proc/none"], "--figures /proc/none cannot be written"),
        (["missing.jsonl", "--figures", "rows.jsonl/x"], "cannot be written: rows.jsonl is a file"),
        (["empty.jsonl"], "have no rows"),
    ],
)
def test_what_it_cannot_do_is_one_sentence_and_a_hint(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    append(tmp_path / "rows.jsonl", offline({"naive": 3000}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.iterdir())
    assert main(["bench", "report", *words]) == 2
    found = capsys.readouterr().err
    assert problem in found and "hint: " in found and "Traceback" not in found
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_how_to_repeat_names_the_file_as_it_was_given_and_the_command_that_made_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows").mkdir()
    append(tmp_path / "my rows" / "a.jsonl", offline({"naive": 3000}, at=where(command="tessera bench offline x")))
    words = ["my rows/a.jsonl", str(tmp_path / "my rows" / "a.jsonl"), "--markdown", "page.md"]
    assert main(["bench", "report", *words]) == 0
    text = (tmp_path / "page.md").read_text().partition("## How to repeat")[2]
    assert "```console\ntessera bench offline x\ntessera bench report 'my rows/a.jsonl'\n```" in text
    assert "- rows of this report: my rows/a.jsonl" in text


def test_the_same_file_twice_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "rows.jsonl", offline({"naive": 3000, "triton": 4000}))
    path = str(tmp_path / "rows.jsonl")
    assert main(["bench", "report", path, path, "--out", str(tmp_path / "page.html")]) == 0
    assert "5 repeats" in capsys.readouterr().out


def test_the_page_lies_beside_its_rows_where_no_place_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("results", "more"):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "offline.jsonl", offline({"naive": 3000, "triton": 4000}, at=where(run=name)))
    assert main(["bench", "report", "results/", "more/offline.jsonl"]) == 0
    assert "wrote results/report.html" in capsys.readouterr().err
    assert main(["bench", "report", "more/offline.jsonl"]) == 0
    pages = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")]
    assert sorted(pages) == ["more/report.html", "results/report.html"]
