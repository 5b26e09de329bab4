"""What kernels are compared on: workloads in vLLM's grammar, heads, and presets of them.

A workload is groups joined by `_`, each `[COUNT]qNEW[k][sHELD[k]]` as in vLLM's attention benchmark
(benchmarks/attention_benchmarks/batch_spec.py): COUNT sequences (1 if left out) with NEW new tokens that
hold HELD tokens in all, the new ones included (NEW if left out); `k` multiplies by 1024. So `q2k` is one
prompt of 2048, `32q1s4k` one step of decoding for 32 sequences of 4096, `2q2k_32q1s4k` both in one step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tessera.attention.contract import Phase
from tessera.bench.record import Value
from tessera.errors import ConfigError

MAX_COUNT, MAX_TOKENS = 65_536, 2**24
"""Largest numbers of a group: sequences, and tokens of one."""
_GROUP = re.compile(r"(\d+)?q(\d+)(k?)(?:s(\d+)(k?))?")
_EXAMPLE = (
    "write [COUNT]qNEW[k][sHELD[k]] joined by _, as 2q2k_32q1s4k: 2 prompts of 2048, 32 sequences decoding at 4096"
)


@dataclass(frozen=True)
class Group:
    """Sequences of one size."""

    count: int
    q_len: int
    """New tokens of each."""
    kv_len: int
    """Tokens that each holds, the new ones included."""

    def __str__(self) -> str:
        """As in the grammar, in its shortest form."""
        held = "" if self.kv_len == self.q_len else f"s{_size(self.kv_len)}"
        return f"{'' if self.count == 1 else self.count}q{_size(self.q_len)}{held}"


@dataclass(frozen=True)
class Heads:
    """Query heads, key-value heads, size of a head."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        """`32/8/128`"""
        return f"{self.query}/{self.kv}/{self.dim}"


@dataclass(frozen=True)
class Part:
    """The sequences of a case that one phase serves."""

    phase: Phase
    groups: tuple[Group, ...]

    @property
    def lens(self) -> tuple[tuple[int, int], ...]:
        """(q_len, kv_len) of each sequence."""
        return tuple((group.q_len, group.kv_len) for group in self.groups for _ in range(group.count))

    @property
    def workload(self) -> str:
        """In the grammar."""
        return "_".join(map(str, self.groups))

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(group.count * group.q_len for group in self.groups)


@dataclass(frozen=True)
class KernelCase:
    """One layer's attention in one step; backends that get equal cases are compared."""

    parts: tuple[Part, ...]
    """One a phase, in the order in which the engine runs them."""
    heads: Heads
    dtype: str
    page_size: int | None
    """None in vision."""
    window: int | None = None
    soft_cap: float | None = None
    mode: str = "engine"
    """engine (decoding as a CUDA graph where the backend allows it, and eagerly too, which is what the engine does
    today), eager or graph."""

    @property
    def workload(self) -> str:
        """In the grammar; decoding sequences first."""
        return "_".join(part.workload for part in self.parts)

    @property
    def phase(self) -> str:
        """`decode`, or `decode+prefill` for a step of both."""
        return "+".join(part.phase for part in self.parts)

    @property
    def fields(self) -> dict[str, Value]:
        """As a Record has it; what was not asked for is left out."""
        fields: dict[str, Value] = {"phase": self.phase, "workload": self.workload, "heads": str(self.heads)}
        fields |= {"dtype": self.dtype, "mode": self.mode}
        asked: dict[str, Value] = {"page_size": self.page_size, "window": self.window, "soft_cap": self.soft_cap}
        return fields | {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True)
class Entry:
    """A row of a preset: a workload for one phase, or, as in a step of the engine, for those that it has."""

    workload: str
    heads: str
    vision: bool = False


_DECODE_HEADS = ("9/3/64", "16/8/128", "32/8/128")
_SMOKE = (
    *(Entry(workload, "9/3/64") for workload in ("2q256", "q64s256", "8q1s512", "q128_8q1s256")),
    Entry("2q256", "9/3/64", vision=True),
)
LADDER = "ladder"
"""What `--ladder` climbs where no workloads are named."""


def _decode(batches: Sequence[int], contexts: Sequence[str]) -> tuple[Entry, ...]:
    return tuple(Entry(f"{n}q1s{kv}", heads) for heads in _DECODE_HEADS for kv in contexts for n in batches)


def _vit(lengths: Sequence[str]) -> tuple[Entry, ...]:
    return tuple(
        Entry(f"{batch}q{length}", f"16/16/{dim}", vision=True)
        for dim in (64, 72, 80)
        for length in lengths
        for batch in (1, 2)
    )


PRESETS: dict[tuple[str, str], tuple[Entry, ...]] = {
    ("cuda", LADDER): tuple(Entry(each, "32/8/128") for each in ("8q1k", "2q4k", "q1s32k", "8q1s4k", "64q1s4k")),
    ("cpu", LADDER): (Entry("2q48", "4/2/32"), Entry("2q1s150", "4/2/32")),
    ("cuda", "smoke"): _SMOKE,
    ("cpu", "smoke"): _SMOKE,
    ("cuda", "decode"): _decode((1, 8, 64, 256), ("512", "4k", "32k")),
    ("cpu", "decode"): _decode((1, 8, 32), ("512", "2k")),
    ("cuda", "vit"): _vit(("1k", "2k", "4k")),
    ("cpu", "vit"): _vit(("256", "512", "1k")),
    ("cuda", "prefill"): (
        Entry("8q1k", "32/8/128"),
        Entry("2q4k", "32/8/128"),
        Entry("q16k", "32/8/128"),
        Entry("8q1k", "9/3/64"),
        *(Entry("4q4k", f"16/16/{dim}", vision=True) for dim in (64, 72, 80)),
        Entry("q1k", "16/16/80", vision=True),
    ),
    ("cpu", "prefill"): (
        Entry("2q256", "32/8/128"),
        Entry("q1k", "32/8/128"),
        Entry("2q256", "9/3/64"),
        *(Entry("q512", f"16/16/{dim}", vision=True) for dim in (64, 72, 80)),
        Entry("q256", "16/16/80", vision=True),
    ),
}
"""(device, name) -> rows. `vit` is the grid of a vision transformer's patches, `prefill` that of FlashAttention's
papers with the heads of small and large models; on a CPU in sizes that end within minutes. `smoke` has the heads of
SmolLM2-135M."""


def parse_workloads(text: str) -> list[tuple[Group, ...]]:
    """The comma-separated workloads of a flag; ConfigError, with an example, for one outside the grammar."""
    return [parse_workload(word.strip()) for word in text.split(",")]


def parse_workload(text: str) -> tuple[Group, ...]:
    """The groups of one workload; ConfigError, with an example, for what is outside the grammar."""
    return tuple(_parse_group(word, text) for word in text.split("_"))


def parse_heads(text: str) -> list[Heads]:
    """The comma-separated `QUERY/KV/SIZE` of a flag; ConfigError for one that no attention can have."""
    found = []
    for word in (part.strip() for part in text.split(",")):
        numbers = [int(number) for number in word.split("/") if number.isdecimal()]
        if len(numbers) != 3 or word.count("/") != 2 or min(numbers) < 1 or max(numbers) > 4096:
            said = f"--heads has {word!r}, which is not query heads/key-value heads/size of a head"
            raise ConfigError(said, "write three numbers from 1 to 4096, as --heads 32/8/128")
        heads = Heads(*numbers)
        if heads.query % heads.kv:
            said = f"--heads has {word}: {heads.query} query heads cannot share {heads.kv} key-value heads evenly"
            raise ConfigError(
                said, f"use a multiple, as --heads {heads.kv * max(1, heads.query // heads.kv)}/{heads.kv}/{heads.dim}"
            )
        found.append(heads)
    return list(dict.fromkeys(found))


def parts_of(groups: Sequence[Group], phases: Sequence[Phase]) -> Iterator[tuple[Part, ...]]:
    """The steps that a workload makes in these phases: one of decode and prefill together, one of vision.

    Sequences with one new token decode, the others prefill, as in the engine. Vision takes whole sequences only, so
    a workload whose sequences have a past makes none.
    """
    decodes = tuple(group for group in groups if group.q_len == 1)
    prefills = tuple(group for group in groups if group.q_len > 1)
    divided = ((Phase.DECODE, decodes), (Phase.PREFILL, prefills))
    if parts := tuple(Part(phase, own) for phase, own in divided if own and phase in phases):
        yield parts
    if Phase.VISION in phases and all(group.q_len == group.kv_len for group in groups):
        yield (Part(Phase.VISION, tuple(groups)),)


def _parse_group(word: str, whole: str) -> Group:
    found = _GROUP.fullmatch(word)
    where = f"workload {whole!r}" + ("" if word == whole else f" has {word!r}, which")
    if found is None:
        raise ConfigError(f"{where} is not a batch", _EXAMPLE)
    count, q_text, q_k, kv_text, kv_k = found.groups()
    q_len = int(q_text) * (1024 if q_k else 1)
    kv_len = int(kv_text) * (1024 if kv_k else 1) if kv_text else q_len
    group = Group(int(count or 1), q_len, kv_len)
    if not (1 <= group.count <= MAX_COUNT and 1 <= q_len <= MAX_TOKENS and kv_len <= MAX_TOKENS):
        said = f"{where} is not within 1 to {MAX_COUNT} sequences of 1 to {MAX_TOKENS} tokens"
        raise ConfigError(said, _EXAMPLE)
    if kv_len < q_len:
        said = f"{where} has sequences with {q_len} new tokens that hold only {kv_len}"
        raise ConfigError(said, f"the number behind s counts the new tokens too: q{q_len}s{q_len + kv_len}")
    return group


def _size(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
