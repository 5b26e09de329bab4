"""`tessera bench report` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthetic_rows import offline
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
        (["rows.jsonl", "--out", "/proc/none/page.html"], "cannot be written"),
        (["empty.jsonl"], "have no rows"),
    ],
)
def test_what_it_cannot_do_is_one_sentence_and_a_hint(
    words: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    append(tmp_path / "rows.jsonl", offline({"naive": 3000}))
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["bench", "report", *words]) == 2
    found = capsys.readouterr().err
    assert problem in found and "hint: " in found and "Traceback" not in found


def test_the_same_file_twice_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(tmp_path / "rows.jsonl", offline({"naive": 3000, "triton": 4000}))
    path = str(tmp_path / "rows.jsonl")
    assert main(["bench", "report", path, path, "--out", str(tmp_path / "page.html")]) == 0
    assert "5 repeats" in capsys.readouterr().out
