"""From rows to a report: the verdict, figures, tables, caveats, how to repeat."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence

from tessera.bench.record import Record
from tessera.bench.report import figures, kernel_figures, tables
from tessera.bench.report.caveats import caveats
from tessera.bench.report.compared import is_named
from tessera.bench.report.document import Block, Bullets, Code, Figure, Report, Section, Table
from tessera.bench.report.rows import Rows, Session, arrange
from tessera.bench.report.verdict import verdict
from tessera.errors import ConfigError

_TITLES = {
    "offline": "Throughput offline",
    "online": "Latency online",
    "kernels": "Kernels",
    "ttft": "Time to the first token",
    "api": "The API under load",
    "quality": "Answers",
}
_STATISTICS = (
    "A ratio is a geometric mean over pairs of repeats. Its interval is the wider of a bootstrap and Student's t "
    "on log ratios; verdicts are corrected for the number of cells judged together (Holm), and below 1% nothing is "
    "called a difference. Two are level where the whole interval lies within 5%. Kernels of one run are compared "
    "round by round, as they took turns."
)


def build(
    records: Sequence[Record], title: str | None = None, baseline: str | None = None, files: Sequence[str] = ()
) -> Report:
    """The report on these rows, of the files or folders `files`, named as they were given.

    ConfigError where there are no rows, or where nothing is labelled `baseline`.
    """
    if not records:
        raise ConfigError("the result files have no rows", "run a benchmark first, as `tessera bench offline`")
    rows = arrange(records)
    if baseline is not None and not any(is_named(baseline, each) for each in rows.labels):
        there = ", ".join(rows.labels) or "none"
        raise ConfigError(f"--baseline {baseline}: no row with figures has this label", f"there are: {there}")
    sections = [*_kinds(rows, baseline), _ran(rows), *_lost(rows), *_caveats(rows), _repeat(rows, files)]
    numbered = _numbered(sections)
    return Report(title or "Attention, measured", _subtitle(rows), verdict(rows, baseline), numbered, rows.styles)


def _subtitle(rows: Rows) -> str:
    machines = dict.fromkeys(row.provenance.machine.name for row in rows.records)
    models = dict.fromkeys(row.conditions.model for row in rows.records if row.conditions.model)
    days = sorted({row.provenance.started[:10] for row in rows.records})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    parts = [*models, *machines, span, tables.succeeded(rows).rstrip(".")]
    return " · ".join(part for part in parts if part)


def _kinds(rows: Rows, baseline: str | None) -> Iterator[Section]:
    order = [*_TITLES, *dict.fromkeys(each.kind for each in rows.sessions if each.kind not in (*_TITLES, "ceiling"))]
    for kind in order:
        sessions = rows.of(kind)
        blocks: list[Block] = []
        for session in sessions:
            if len(sessions) > 1:
                blocks.append(f"{session.where}, commit {session.commit}: {session.command}")
            blocks += _session(rows, session, baseline)
        if blocks:
            yield Section(_TITLES.get(kind, kind.capitalize()), blocks)
    if ceilings := rows.of("ceiling"):
        yield Section("Measured ceilings", [tables.everything(rows, session) for session in ceilings])


def _session(rows: Rows, session: Session, baseline: str | None) -> list[Block]:
    makers: dict[str, Callable[[Rows, Session], Sequence[Figure | Table]]] = {
        "offline": _offline,
        "online": _online,
        "kernels": kernel_figures.kernels,
        "ttft": _ttft,
        "api": figures.sweep,
        "quality": lambda rows, session: [tables.answers(rows, session)],
    }
    maker = makers.get(session.kind)
    drawn = list(maker(rows, session)) if maker else []
    standing = tables.standing_table(rows, session, baseline)
    return [*drawn, *([standing] if standing else []), *([] if drawn else [tables.everything(rows, session)])]


def _offline(rows: Rows, session: Session) -> list[Figure]:
    metric = next((name for name in ("output_tok_s", "total_tok_s", "req_s") if name in session.metrics), "")
    text = "Throughput offline: the median as a bar, every repeat as a dot."
    return figures.bars(rows, session, metric, "offline-throughput", text)


def _online(rows: Rows, session: Session) -> list[Figure]:
    text = "Throughput online: the median as a bar, every repeat as a dot."
    drawn = figures.online(rows, session)
    return drawn or figures.bars(rows, session, "output_tok_s", "online-throughput", text)


def _ttft(rows: Rows, session: Session) -> list[Figure]:
    text = "Time to the first token: the median as a bar, every repeat as a dot."
    return figures.bars(rows, session, "ttft_ms", "ttft", text)


def _ran(rows: Rows) -> Section:
    memory = tables.memory(rows)
    return Section("What ran", [tables.what_ran(rows), *([memory] if memory else [])])


def _lost(rows: Rows) -> Iterator[Section]:
    if table := tables.lost(rows):
        yield Section("What did not run", [tables.succeeded(rows), table])


def _caveats(rows: Rows) -> Iterator[Section]:
    if found := caveats(rows):
        yield Section("Caveats", [Bullets(found)])


def _repeat(rows: Rows, files: Sequence[str]) -> Section:
    """Commands, files, versions, machines, how the statistics were made."""
    commands = list(dict.fromkeys(row.provenance.command for row in rows.records))
    if files:
        commands.append(f"tessera bench report {shlex.join(files)}")
    commits = ", ".join(dict.fromkeys(row.provenance.commit for row in rows.records))
    read = [f"rows of this report: {', '.join(files)}"] if files else []
    versions = dict.fromkeys((name, number) for row in rows.records for name, number in row.provenance.versions.items())
    columns, body = ["package", "version"], [[name, number] for name, number in sorted(versions)]
    return Section(
        "How to repeat",
        [
            Code("\n".join(commands)),
            Bullets([*read, *_machines(rows), f"commit {commits}"]),
            Table("Versions", columns, body),
            _STATISTICS,
        ],
    )


def _machines(rows: Rows) -> list[str]:
    """A line each."""
    found = {}
    for row in rows.records:
        where = row.provenance.machine
        found[where.name] = (
            (f"{where.name}: " if where.gpus else "")
            + f"{where.cpu}, {where.cores} cores, {where.memory_gib:g} GiB, {where.system}, "
            f"Python {where.python}" + (f", driver {where.driver}, CUDA {where.cuda}" if where.driver else "")
        )
    return list(found.values())


def _numbered(sections: Sequence[Section]) -> list[Section]:
    """Figures of one name get a number, so that their files do not overwrite one another."""
    seen: dict[str, int] = {}
    found = []
    for section in sections:
        blocks: list[Block] = []
        for block in section.blocks:
            if isinstance(block, Figure):
                seen[block.name] = seen.get(block.name, 0) + 1
                name = block.name if seen[block.name] == 1 else f"{block.name}-{seen[block.name]}"
                block = Figure(name, block.caption, block.panels, block.legend, block.table)
            blocks.append(block)
        found.append(Section(section.title, blocks))
    return found
