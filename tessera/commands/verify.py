"""Check that an attention backend keeps what it claims, and say which claim fails.

Runs the conformance kit on one backend: every workload, head size, group and page size it claims against an oracle,
then a tiny random model through the engine. Exit code 0: every claim holds. 1: one does not. 2: wrong usage.
3: the backend cannot be used here, so that nothing was checked. One that can serve some phases is checked in those.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import msgspec

from tessera.commands.flags import Parser
from tessera.commands.table import render
from tessera.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from tessera.attention.contract import AttentionBackend
    from tessera.attention.verify import Check, Report

PHASES = ("prefill", "decode", "vision")
DTYPES = ("float32", "bfloat16", "float16")
SLOW_SECONDS = 2.0
DEVICES = ("cpu", "cuda")
UNAVAILABLE = 3
"""The exit code where nothing could be checked."""


def add_flags(parser: Parser) -> None:
    """The backend, and what part of its claims to check."""
    parser.add_argument("name", metavar="NAME", help="A backend that `tessera backends` lists.")
    parser.add_argument(
        "--phase", action="append", choices=PHASES, help="Only this phase; may be repeated. Left out: all it claims."
    )
    parser.add_argument(
        "--dtype", action="append", choices=DTYPES, help="Only this type; may be repeated. Left out: all it claims."
    )
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto", help="auto: the GPU if there is one.")
    parser.add_argument("--json", action="store_true", help="One JSON object a check, and a last one with the summary.")


def run(args: argparse.Namespace) -> int:
    """Check and print."""
    import torch

    from tessera.attention.contract import Phase
    from tessera.attention.registry import load_backend
    from tessera.attention.verify import verify
    from tessera.engine.verify import engine_checks
    from tessera.runner.device import choose_device

    device = choose_device(args.device).type
    try:
        backend = load_backend(args.name)
    except BackendError as error:  # its module does not import
        return _refuse(Unavailable(args.name, device, [error.message], error.hint, {}), as_json=args.json)
    phases = [phase for phase in Phase if phase in args.phase] if args.phase else None
    if missing := [phase for phase in phases or () if phase not in backend.limits]:
        raise ConfigError(
            f"{args.name} has no {' and no '.join(missing)} kernel", f"use --phase {' --phase '.join(backend.limits)}"
        )
    dtypes = [getattr(torch, name) for name in DTYPES if name in args.dtype] if args.dtype else None
    on_check = _reporter(as_json=args.json)
    report = verify(backend, phases=phases, dtypes=dtypes, device_type=device, on_check=on_check)
    if report.unavailable:
        hint = _hint(backend, report)
        refusal = Unavailable(report.backend, device, report.unavailable, hint, versions(backend))
        return _refuse(refusal, as_json=args.json)
    for check in engine_checks(args.name, backend, phases, dtypes, device):
        report.checks.append(check)
        on_check(check)
    if args.json:
        _print_json({"summary": _summary(report, backend) | {"unavailable": False, "reasons": []}})
    else:
        sys.stdout.write(table(report, versions(backend)))
    return 0 if report.passed else 1


@dataclass(frozen=True)
class Unavailable:
    """A backend that cannot be used here."""

    name: str
    device: str
    reasons: list[str]
    hint: str | None
    versions: dict[str, str]


def _refuse(refusal: Unavailable, *, as_json: bool) -> int:
    """Say why nothing was checked; the exit code."""
    verdict = f"{refusal.name} cannot be used here on {refusal.device}, nothing was checked"
    if as_json:
        counts = {"ok": False, "passed": 0, "failed": 0, "not_claimed": 0}
        named = {"backend": refusal.name, "device": refusal.device, "versions": refusal.versions}
        why = {"verdict": verdict, "unavailable": True, "reasons": refusal.reasons, "hint": refusal.hint}
        _print_json({"summary": named | counts | why})
    else:
        hint = f"\nhint: {refusal.hint}\n" if refusal.hint else ""
        sys.stdout.write("\n".join([f"{verdict}:", *(f"  {reason}" for reason in refusal.reasons)]) + "\n" + hint)
    return UNAVAILABLE


def _hint(backend: type[AttentionBackend[Any]], report: Report) -> str | None:
    """What installs it, and where: either alone may not be enough."""
    install = backend.install if any("is not installed" in reason for reason in report.unavailable) else None
    devices = [device for device in DEVICES if any(device in limits.devices for limits in backend.limits.values())]
    if report.device in devices or not devices:
        return install
    where = f"on a machine with {' or '.join(devices)}"
    return f"{install}, {where}" if install else f"verify it {where}"


def versions(backend: type[AttentionBackend[Any]]) -> dict[str, str]:
    """Version of each distribution that decides what runs."""
    found = {}
    for package in backend.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(report: Report, installed: dict[str, str]) -> str:
    """What was checked, phase by phase, then every failure and what is not claimed, in words."""
    packages = ", ".join(f"{name} {number}" for name, number in installed.items())
    lines = [f"{report.backend} on {report.device} ({packages})", ""]
    kinds = list(dict.fromkeys(check.kind for check in report.checks))
    rows = [("phase", "dtype", *kinds)]
    for part in dict.fromkeys((check.phase, check.dtype) for check in report.checks):
        of_part = [check for check in report.checks if (check.phase, check.dtype) == part]
        rows.append((*part, *(_cell([check for check in of_part if check.kind == kind]) for kind in kinds)))
    lines += [render(rows, indent=""), ""]
    lines += [f"not claimed: {line}" for line in _not_claimed(report)]
    lines += [f"FAILED {check.phase} {check.dtype} {check.label}: {check.detail}" for check in report.failed]
    lines.append(_verdict(report))
    return "\n".join(lines) + "\n"


def _cell(of_kind: list[Check]) -> str:
    """Passed of run; nothing where nothing was run."""
    counts = Counter(check.outcome for check in of_kind)
    ran = counts["pass"] + counts["fail"]
    return f"{counts['pass']}/{ran}" if ran else "-"


def _not_claimed(report: Report) -> list[str]:
    """Each reason once, with the checks that it kept from running."""
    by_reason: dict[tuple[str, str], dict[str, None]] = {}
    for check in report.checks:
        if check.outcome == "not claimed":
            by_reason.setdefault((check.phase, check.detail), {})[check.label] = None
    return [f"{phase} {' '.join(labels)}: {reason}" for (phase, reason), labels in by_reason.items()]


def _verdict(report: Report) -> str:
    counts = Counter(check.outcome for check in report.checks)
    if report.passed:
        return f"every claim holds: {counts['pass']} checks passed, {counts['not claimed']} are not claimed"
    if not report.failed:
        return f"nothing was checked: {report.backend} claims none of what was asked"
    return f"{counts['fail']} of {counts['pass'] + counts['fail']} checks failed"


def _summary(report: Report, backend: type[AttentionBackend[Any]]) -> dict[str, Any]:
    counts = Counter(check.outcome for check in report.checks)
    return {
        "backend": report.backend,
        "device": report.device,
        "versions": versions(backend),
        "ok": report.passed,
        "passed": counts["pass"],
        "failed": counts["fail"],
        "not_claimed": counts["not claimed"],
        "verdict": _verdict(report),
    }


def _reporter(*, as_json: bool) -> Callable[[Check], None]:
    """Writes each check to standard output as JSON, and where the kit has got to, to standard error."""
    seen: set[tuple[str, str]] = set()

    def report(check: Check) -> None:
        if (check.phase, check.dtype) not in seen:
            seen.add((check.phase, check.dtype))
            sys.stderr.write(f"checking {check.phase} {check.dtype}\n")
        if check.outcome == "fail" or check.seconds > SLOW_SECONDS:  # the long-winded ones show that it is alive
            sys.stderr.write(f"  {check.label}: {check.outcome}, {check.seconds:.1f} s\n")
        if as_json:
            _print_json(
                {
                    "phase": check.phase,
                    "dtype": check.dtype,
                    "check": check.label,
                    "outcome": check.outcome,
                    "detail": check.detail,
                    "seconds": round(check.seconds, 4),
                }
            )

    return report


def _print_json(fields: dict[str, Any]) -> None:
    sys.stdout.write(msgspec.json.encode(fields).decode() + "\n")
    sys.stdout.flush()
