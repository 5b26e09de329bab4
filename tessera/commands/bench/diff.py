"""Compare two result files: what became better, what worse, what is noise.

Each run counts once, as the median of its repeats, for repeats of one run do not show how far two runs of one code lie
apart. A verdict needs at least three runs a side: run each version three times or more, best in turns (A, B, A, B, ...)
so that drift of the machine cancels, and give each version its own file or folder. With fewer, a change cannot be told
from a run: it is shown and not judged. Only answers (quality) are judged from one run, as they have no chance in them.

Exit code 0: no regression in what could be judged. 1: something is worse, significantly and by more than the
threshold. 2: wrong usage, or files that must not be compared. 3: nothing could be judged, as with too few runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from tessera.commands.flags import Parser
from tessera.commands.table import render
from tessera.errors import ConfigError

if TYPE_CHECKING:
    from tessera.bench.diff import Change, Difference

NOT_JUDGED = 3
"""Exit code where nothing had a verdict: neither a pass nor a regression."""


def add_flags(parser: Parser) -> None:
    """The files, and what counts as worse."""
    parser.add_argument("before", type=Path, metavar="A.jsonl", help="The older rows: a file, or a folder of them.")
    parser.add_argument("after", type=Path, metavar="B.jsonl", help="The newer rows.")
    parser.add_argument(
        "--threshold", type=float, default=0.03, help="Ratios nearer to 1 than this are no difference. Default: 0.03."
    )
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="NAME",
        help="Only this metric; may be repeated; `all` for every one. Left out: those that a report speaks of.",
    )
    parser.add_argument(
        "--across-machines", action="store_true", help="Compare although machine, model or dtype differ."
    )
    parser.add_argument("--json", action="store_true", help="One JSON object with every change.")


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    if not 0 <= args.threshold < 1:
        raise ConfigError(f"--threshold {args.threshold:g} is not between 0 and 1", "use 0.03 for 3%")
    from tessera.bench.options import require

    require("scipy", "bench", "a comparison")
    from tessera.bench.diff import difference
    from tessera.bench.record import read

    before, after = read(args.before), read(args.after)
    found = difference(
        before, after, threshold=args.threshold, metrics=args.metric, across_machines=args.across_machines
    )
    if args.json:
        counts = {"judged": len(found.judged), "regressions": len(found.regressions)}
        fields = {**msgspec.to_builtins(found), **counts}
        sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
    else:
        sys.stdout.write(_text(found, args.threshold))
    if not found.judged:
        return NOT_JUDGED
    return 1 if found.regressions else 0


def _text(found: Difference, threshold: float) -> str:
    """The table and what follows from it."""
    cells = [_cells(change) for change in sorted(found.changes, key=lambda change: change.ratio or 1.0)]
    head = ("benchmark", "case", "subject", "metric", "before", "after", "times better", "95% interval", "verdict")
    lines = [render([head, *cells], indent=""), ""]
    for what, missing in (("first", found.only_before), ("second", found.only_after)):
        lines += [f"only in the {what} file: {each}" for each in missing]
    few = [change.num_runs for change in found.changes if change.outcome == "too few runs"]
    if few:
        runs = "one run each" if max(few) == 1 else "fewer than 3 runs a side"
        lines.append(f"{len(few)} of {len(found.changes)} not judged: {runs}: cannot tell a run from the code")
    lines.append(_verdict(found, threshold) if found.judged else _no_verdict(bool(few)))
    return "\n".join(lines) + "\n"


def _verdict(found: Difference, threshold: float) -> str:
    """What was found in that which could be judged, and how it was."""
    how = "pairs of runs" if found.paired else "runs, unpaired: drift of the machine between them counts"
    number, judged, total = len(found.regressions), len(found.judged), len(found.changes)
    counted = f"{number} regression{'' if number == 1 else 's'}" if number else "no regression"
    share = "" if judged == total else f" in the {judged} of {total} that could be judged"
    return f"{counted} beyond {threshold:.1%}{share}; compared as {how}"


def _no_verdict(few: bool) -> str:
    """Said in place of a verdict, with what would give one."""
    hint = "three runs a side give a verdict" if few else "name metrics that have a better side with --metric"
    return f"nothing could be judged\n\nhint: {hint}"


def _cells(change: Change) -> tuple[str, ...]:
    from tessera.bench.report.metrics import number

    ratio = f"{change.ratio:.3f}" if change.ratio is not None else "-"
    interval = f"{change.low:.3f} to {change.high:.3f}" if change.low is not None else "-"
    values = (number(change.metric, change.before), number(change.metric, change.after))
    return change.kind, change.case, change.label, change.metric, *values, ratio, interval, change.outcome
