"""Traces on disk, one JSON object a line: Mooncake's format, read and written, and that of Alibaba's Qwen traces.

Mooncake (Qin et al., FAST 2025): `timestamp` in milliseconds, `input_length`, `output_length`, `hash_ids` of blocks
of 512 tokens. Qwen (alibaba-edu/qwen-bailian-usagetraces-anon): also `chat_id`, `parent_chat_id`, `type` and `turn`,
with `timestamp` in seconds and blocks of 16 tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tessera.bench.online.trace import BLOCK_TOKENS, Arrival, Trace
from tessera.errors import ConfigError

QWEN_BLOCK_TOKENS = 16
MAX_TOKENS = 2**24


class _Line(msgspec.Struct):
    """One request; fields of no influence (type, turn, parent_chat_id) are left unread."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None
    chat_id: int | str | None = None


def read_trace(path: Path, number: int | None = None) -> Trace:
    """The first `number` requests of a file, or all, in order of arrival, the first at 0.

    A line with a `chat_id` makes the file one of Qwen's. A line without `hash_ids` shares its prompt with no other.
    ConfigError for what is no trace, with file and line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no trace {path}", "name a .jsonl file, or --trace poisson")
    lines = list(itertools.islice(_lines(path), number))
    if not lines:
        raise ConfigError(f"the trace {path} has no request", "name another file, or --trace poisson")
    kinds = {line.chat_id is not None for _, line in lines}
    if len(kinds) > 1:
        raise ConfigError(f"the trace {path} has lines with and without chat_id: which format is it?", "mend the file")
    block_tokens, second = (QWEN_BLOCK_TOKENS, 1.0) if kinds.pop() else (BLOCK_TOKENS, 1000.0)
    begin = min(line.timestamp for _, line in lines)
    own = itertools.count(1 + max(max(line.hash_ids or [0]) for _, line in lines))
    arrivals = []
    for place, line in lines:
        ids = _block_ids(place, line, block_tokens, own)
        arrivals.append(Arrival((line.timestamp - begin) / second, line.input_length, line.output_length, ids))
    trace = Trace(path.name, sorted(arrivals, key=lambda each: each.at_s), block_tokens)
    return trace.first(number) if number is not None else trace


def write_mooncake(path: Path, trace: Trace) -> None:
    """Write a trace in Mooncake's format, times rounded to milliseconds; ConfigError for blocks of other than 512."""
    if trace.block_tokens != BLOCK_TOKENS:
        said = f"the trace {trace.name} has blocks of {trace.block_tokens} tokens, Mooncake's have {BLOCK_TOKENS}"
        raise ConfigError(said, "leave --write-trace out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for each in trace.arrivals:
            line = {
                "timestamp": round(1000 * each.at_s),
                "input_length": each.input_tokens,
                "output_length": each.output_tokens,
                "hash_ids": each.hash_ids,
            }
            file.write(msgspec.json.encode(line) + b"\n")


def _block_ids(place: str, line: _Line, block_tokens: int, own: Iterator[int]) -> tuple[int, ...]:
    """An id for each block; those that the line has none for, its last and shorter one or all, share with no other."""
    num_full, num_blocks = line.input_length // block_tokens, -(-line.input_length // block_tokens)
    ids = line.hash_ids or []
    if line.hash_ids is not None and len(ids) not in (num_full, num_blocks):
        said = f"{place} has {len(ids)} hash_ids for {line.input_length} tokens in blocks of {block_tokens}"
        raise ConfigError(said, f"there must be {num_blocks}")
    return (*ids, *itertools.islice(own, num_blocks - len(ids)))


def _lines(path: Path) -> Iterator[tuple[str, _Line]]:
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            place = f"{path} line {number}"
            try:
                line = msgspec.json.decode(text, type=_Line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(f"{place} is no request of a trace: {error}", "mend the line") from None
            if line.timestamp < 0 or min(line.hash_ids or [0]) < 0:
                raise ConfigError(f"{place} has a negative timestamp or hash id", "mend the line")
            for name in ("input_length", "output_length"):
                if not 1 <= (length := getattr(line, name)) <= MAX_TOKENS:
                    raise ConfigError(f"{place} has {name} {length}, not 1 to {MAX_TOKENS}", "mend the line")
            yield place, line
