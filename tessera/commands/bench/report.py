"""Turn rows into one page: the verdict in words, figures, what ran and its proof, caveats, how to repeat.

The page holds everything itself and asks nothing of any network. Rows are compared only with rows that the same
command made on the same machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tessera.bench.places import check_file, check_folder
from tessera.commands.flags import Parser
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.report.document import Report

Result = TypeVar("Result")


def add_flags(parser: Parser) -> None:
    """The rows, and what to write."""
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="A .jsonl file, or a folder of them.")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="The page. Left out: report.html beside the (first) results."
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="Write the same as Markdown, too.")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="Write each figure as .svg and .png, too.")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="What the others are compared with. Left out: naive, else torch_sdpa."
    )
    parser.add_argument("--title", help="Of the page.")


def run(args: argparse.Namespace) -> int:
    """Read, write, and say the verdict."""
    args.out = args.out or _beside(args.results[0])
    _check_paths(args)
    from tessera.bench.options import require

    for module in ("matplotlib", "scipy"):
        require(module, "bench", "a report")
    from tessera.bench.record import read
    from tessera.bench.report.build import build
    from tessera.bench.report.page import html, markdown

    files = {path.resolve(): path for path in reversed(args.results)}
    given = [path for path in args.results if path is files[path.resolve()]]
    report = build([row for path in given for row in read(path)], args.title, args.baseline, list(map(str, given)))
    _write(args.out, html(report))
    images = _figures(report, args) if args.figures else {}
    if args.markdown:
        _write(args.markdown, markdown(report, images))
    sys.stdout.write("\n\n".join(report.verdict) + "\n")
    return 0


def _beside(results: Path) -> Path:
    """The page's place where none is named: with the rows, not where the command happens to be called."""
    return (results if results.is_dir() else results.parent) / "report.html"


def _figures(report: Report, args: argparse.Namespace) -> dict[str, str]:
    """Each figure's image, as the Markdown file names it."""
    from tessera.bench.report.drawing import write_files

    beside = args.markdown.parent if args.markdown else args.figures
    images = {}
    _tried(args.figures, partial(args.figures.mkdir, parents=True, exist_ok=True))
    for figure in report.figures:
        paths = _tried(args.figures, partial(write_files, figure, args.figures, report.styles))
        images[figure.name] = Path(os.path.relpath(paths[0], beside)).as_posix()
        for path in paths:
            sys.stderr.write(f"wrote {path}\n")
    return images


def _check_paths(args: argparse.Namespace) -> None:
    """ConfigError for what would overwrite rows, hide a page or cannot be written, before anything is read."""
    suffixes = {"--out": (args.out, (".html", ".htm")), "--markdown": (args.markdown, (".md",))}
    for flag, (path, allowed) in suffixes.items():
        if path is not None and path.suffix not in allowed:
            raise ConfigError(f"{flag} {path} does not end in {allowed[0]}", f"use {flag} {path}{allowed[0]}")
        if path is not None:
            check_file(flag, path)
    if args.figures is not None:
        check_folder("--figures", args.figures)


def _write(path: Path, text: str) -> None:
    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    _tried(path, write)
    sys.stderr.write(f"wrote {path}\n")


def _tried(path: Path, write: Callable[[], Result]) -> Result:
    try:
        return write()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}", "name a place you may write"
        ) from None
