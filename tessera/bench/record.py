"""One row of a result file: what was asked, what ran, under which conditions, and what was measured.

A file is JSON lines. A row is one repeat of one case by one subject, so that statistics are made by whoever
reads the rows and never lost by whoever wrote them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from tessera.bench.provenance import Provenance
from tessera.errors import ConfigError
from tessera.log import logger
from tessera.types import AttentionProof

Kind = Literal["kernels", "offline", "online", "api", "ttft", "quality", "ceiling"]
Status = Literal["ok", "failed", "unavailable"]
CacheState = Literal["cold", "warm", "off", "not recorded"]
Value = str | int | float | bool | None
OF_ENGINE = ("page_size", "num_pages", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_four_bit_layers")
"""Fields of EngineInfo that may change a figure: they go into a row's settings."""


@dataclass(frozen=True)
class Subject:
    """What is measured: an engine or a server, and the attention backends that it was asked for and that ran."""

    label: str
    """As in tables and figures: `triton`, `flash_attn:4+flashinfer:tensor_cores`, `vllm`."""
    engine: str = "tessera"
    """`tessera`, `vllm`, `hf`, `llamacpp`, or `server` for a URL of unknown make; `torch` measures ceilings, `none` the
    network."""
    asked: dict[str, str] = field(default_factory=dict)
    """Backend named for each phase; `auto` where the engine was to choose."""
    resolved: dict[str, list[str]] = field(default_factory=dict)
    """Backends that serve each phase."""
    proofs: list[AttentionProof] = field(default_factory=list)
    """What a profiler saw of them; [] only where the engine is not ours, and then `note` says so."""
    note: str = ""
    """What a reader must know: `not proven: another engine`."""


@dataclass(frozen=True)
class Conditions:
    """All that may change a figure and is not the subject."""

    model: str = ""
    dtype: str = ""
    device: str = ""
    """`cpu` or `cuda`; which one is in the provenance."""
    seed: int = 0
    warmup: str = ""
    """What ran before the clock: `1 pass`, `none`."""
    cache: CacheState = "not recorded"
    """Of the prefix cache, when the clock started; for kernels of the processor's caches."""
    settings: dict[str, Value] = field(default_factory=dict)
    """Everything else that was set: temperature, page_size, max_num_seqs, ..."""


@dataclass(frozen=True)
class Record:
    """One repeat of one case by one subject.

    Raises ValueError for a row of ours that is said to be ok and has no proof, or whose proof is of another
    backend than it names: such a figure must not exist.
    """

    kind: Kind
    case: dict[str, Value]
    """What was run: rows whose kind and case are equal are compared with one another."""
    subject: Subject
    status: Status
    conditions: Conditions
    provenance: Provenance
    repeat: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Named with their unit: `output_tok_s`, `ttft_ms_p50`, `peak_memory_bytes`."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    """The single measurements behind a metric, where there are some: `ttft_ms`, `itl_ms`."""
    reason: str = ""
    """Why it failed or is unavailable; empty where it is ok."""

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a row that is {self.status} must say why")
        if self.status != "ok" and self.metrics:
            raise ValueError(f"a row that is {self.status} must not have figures: {sorted(self.metrics)}")
        if self.status == "ok" and self.subject.engine == "tessera":
            _check_proof(self.subject)

    @property
    def case_key(self) -> str:
        """The same for rows that are compared with one another."""
        return " ".join(f"{name}={value}" for name, value in [("kind", self.kind), *sorted(self.case.items())])


def append(path: Path, records: Iterable[Record]) -> None:
    """Add rows to a file, made with its folder where it is missing; each row is on disk before the next begins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and not _ends_in_newline(file):  # a row was cut off when a run was killed
            file.write(b"\n")
        for record in records:
            file.write(msgspec.json.encode(_finite(record)) + b"\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """The rows of a file, or of every .jsonl file in a folder. ConfigError where one cannot be read, with its line."""
    if not path.exists():
        raise ConfigError(f"there is no result file {path}", "run `tessera bench` first, or mend the name")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"the folder {path} has no .jsonl file", "name a folder that `tessera bench` wrote to")
    return [record for file in files for record in _read_file(file)]


def _read_file(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield msgspec.json.decode(line, type=Record)
        except msgspec.DecodeError as error:
            if isinstance(error, msgspec.ValidationError) or not line.startswith(b'{"kind":'):
                raise _no_row(path, number, error) from None
            logger.warning("%s line %d is cut off, as where a run was killed: left out", path, number)
        except ValueError as error:
            raise _no_row(path, number, error) from None


def _no_row(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} line {number} is not a row of a benchmark: {error}", "name a file that `tessera bench` wrote"
    )


def _ends_in_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _check_proof(subject: Subject) -> None:
    proven = {(proof.phase, proof.backend) for proof in subject.proofs}
    ran = {(phase, name) for phase, names in subject.resolved.items() for name in names}
    if not ran or proven != ran:
        raise ValueError(f"{subject.label}: served by {sorted(ran)}, but proven was {sorted(proven)}")
    if empty := sorted(proof.phase for proof in subject.proofs if not proof.symbols):
        raise ValueError(f"{subject.label}: the proof of {', '.join(empty)} names no kernel")
    if missing := sorted(set(subject.asked) - set(subject.resolved)):
        raise ValueError(f"{subject.label}: asked for {', '.join(missing)}, and nothing is known to have served it")
    for phase, asked in subject.asked.items():
        if asked != "auto" and subject.resolved[phase] != [asked]:
            raise ValueError(f"{subject.label}: {phase} was asked of {asked} and served by {subject.resolved[phase]}")


def _finite(record: Record) -> Record:
    """The record itself; ValueError for figures that JSON has no word for, which no honest measurement has."""
    bad: Mapping[str, float] = {k: v for k, v in record.metrics.items() if v != v or v in (float("inf"), -float("inf"))}
    if bad:
        raise ValueError(f"{record.case_key} {record.subject.label}: not finite: {dict(bad)}")
    return record
