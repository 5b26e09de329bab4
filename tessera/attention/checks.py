"""The checks of the conformance kit, one function each: it makes calls and returns what was wrong, as sentences.

A check that would ask what the backend does not claim raises NotClaimed. `verify` decides which checks run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Limits, Phase, Shape
from tessera.attention.workloads import DECODES, WORKLOADS, Case, Workload, make_batch, make_case, workload_seed

Problems = list[str]

MIXED = {
    Phase.PREFILL: Workload(((19, 19), (7, 40), (1, 1))),
    Phase.DECODE: Workload(((1, 70), (1, 3), (1, 129))),
    Phase.VISION: Workload(((40, 40), (1, 1), (70, 70))),
}
"""A few sequences of unlike lengths, for checks of everything but lengths."""
ALIKE = {
    Phase.PREFILL: ((33, 33), (64, 100), (33, 33), (1, 90), (130, 200), (31, 400)) * 2,
    Phase.DECODE: tuple((1, n) for n in (5, 64, 65, 90, 128, 130, 300, 301, 512, 700)) * 2,
    Phase.VISION: ((64, 64), (33, 33), (130, 130), (1, 1), (64, 64)) * 2,
}
"""Lengths of sequences that batch invariance is asked of."""
MANY = Workload(tuple((1, kv_len + i) for i in range(6) for kv_len in (1, 64, 17, 300, 2, 130, 33, 90)))
MANY_KV_HEADS = 8
"""Times the sequences of MANY more than two for each multiprocessor of any GPU so far (188 of them): kernels may be
compiled and share work out otherwise for so many, as long as a few have tokens enough to be split.
"""
MANY_HEAD_DIMS = (64, 128)
"""Sizes of heads that they may differ in."""


class NotClaimed(Exception):  # noqa: N818 - nothing is wrong
    """The backend does not say that it does what a check would ask; the text says what."""


@dataclass(frozen=True)
class Subject:
    """What is being verified: a backend in one phase, with sizes and a type that it claims."""

    backend: type[AttentionBackend[Any]]
    phase: Phase
    base: Shape

    @property
    def limits(self) -> Limits:
        """What the backend says of this phase."""
        return self.backend.limits[self.phase]

    def require(self, shape: Shape) -> None:
        """Raise NotClaimed with every reason against `shape`."""
        if reasons := self.backend.reasons_against(self.phase, shape):
            raise NotClaimed("; ".join(reasons))

    def case(self, workload: Workload, *, seed: int = 0, ordered_pages: bool = False, **sizes: Any) -> Case:
        """Inputs for a workload, in the base shape with other `sizes`; NotClaimed where it is refused."""
        shape = replace(self.base, **sizes)
        if self.phase is Phase.DECODE and workload.max_q_len > self.limits.max_q_len:
            raise NotClaimed(f"{workload.max_q_len} new tokens a sequence, at most {self.limits.max_q_len} are claimed")
        self.require(workload.bind(self.phase, shape))
        seed = workload_seed(seed, self.phase.value, workload.lens)
        return make_case(self.phase, workload, shape, seed=seed, ordered_pages=ordered_pages)


def workload(subject: Subject, asked: Workload, **sizes: Any) -> Problems:
    """One call on a newly bound backend gives the oracle's answer."""
    case = subject.case(asked, **sizes)
    return case.problems(case.answer(subject.backend))


def head_dim(subject: Subject, size: int) -> Problems:
    """Heads of `size`."""
    return workload(subject, MIXED[subject.phase], head_dim=size, scale=size**-0.5)


def group(subject: Subject, size: int) -> Problems:
    """`size` query heads a key head: with two key heads, and with one, where swapped heads cannot hide."""
    counts = (2, 1) if size <= 8 else (1,)
    return [
        f"{problem} ({count * size} query and {count} key-value heads)"
        for count in counts
        for problem in workload(subject, MIXED[subject.phase], num_q_heads=count * size, num_kv_heads=count)
    ]


def page_size(subject: Subject, size: int) -> Problems:
    """Pages of `size` tokens, shuffled and in order."""
    if subject.phase is Phase.VISION:
        raise NotClaimed("there are no pages in vision")
    return [
        f"{problem} (pages {'in order' if ordered else 'shuffled'})"
        for ordered in (False, True)
        for problem in workload(subject, MIXED[subject.phase], page_size=size, ordered_pages=ordered)
    ]


def scale(subject: Subject) -> Problems:
    """A scale that is not 1/sqrt(head_dim), as Gemma and others have."""
    return workload(subject, MIXED[subject.phase], scale=subject.base.scale * 1.7)


def random_batches(subject: Subject) -> Problems:
    """Batches of random lengths, with a window of random size where windows are claimed."""
    draw, found = random.Random(0), []
    for seed in range(8):
        lens = tuple(_random_lens(draw, subject.phase) for _ in range(draw.randint(1, 9)))
        windowed = subject.limits.windows and subject.phase is not Phase.VISION and seed % 2
        asked = Workload(lens, window=draw.randint(1, 200) if windowed else None)
        found += [f"{problem} for {describe(asked)}" for problem in workload(subject, asked, seed=seed)]
    return found[:1]


def many_sequences(subject: Subject) -> Problems:
    """So many sequences of unlike lengths that they fill a GPU, and a few after them by the same instance."""
    counts: dict[str, Any] = {"num_q_heads": MANY_KV_HEADS * subject.base.group, "num_kv_heads": MANY_KV_HEADS}
    found = []
    for size in [size for size in MANY_HEAD_DIMS if size in subject.limits.head_dims] or [subject.base.head_dim]:
        cases = [
            subject.case(asked, head_dim=size, scale=size**-0.5, **counts) for asked in (MANY, MIXED[subject.phase])
        ]
        bound = subject.backend(subject.phase, cases[0].shape)
        for case in cases:
            of = f"{len(case.batch.kv_lens_cpu)} sequences, heads of {size}"
            found += [f"{problem} ({of})" for problem in case.problems(case.answer_of(bound))]
    return found


def strided_inputs(subject: Subject) -> Problems:
    """Slices of one wider tensor serve as q, in VISION as k and v too: a fused projection returns them so."""
    case = subject.case(MIXED[subject.phase])
    parts = [case.q] if subject.phase is not Phase.VISION else [case.q, case.k, case.v]
    wide = torch.cat((*parts, torch.full_like(case.q[:, :1], 1e4)), dim=1)
    slices = list(torch.split(wide, [*(part.shape[1] for part in parts), 1], dim=1))
    k, v = slices[1:3] if subject.phase is Phase.VISION else (case.k, case.v)
    strided = replace(case, q=slices[0], k=k, v=v)
    return strided.problems(strided.answer(subject.backend))


def wide_page_table(subject: Subject) -> Problems:
    """The page table may be a slice of a larger buffer: rows further apart than wide, columns no sequence needs."""
    if subject.phase is Phase.VISION:
        raise NotClaimed("there are no pages in vision")
    case = subject.case(MIXED[subject.phase])
    seqs, pages = case.batch.page_table.shape
    buffer = case.batch.page_table.new_zeros(seqs + 2, pages + 13)
    buffer[:seqs, :pages] = case.batch.page_table
    wide = replace(case, batch=replace(case.batch, page_table=buffer[:seqs, : pages + 3]))
    return wide.problems(wide.answer(subject.backend))


def changing_steps(subject: Subject) -> Problems:
    """One instance serves steps of changing size and content: what it keeps must not leak into the next step."""
    plain = [
        w for w in WORKLOADS[subject.phase].values() if w.bind(subject.phase, subject.base) == plain_shape(subject)
    ]
    bound = subject.backend(subject.phase, plain_shape(subject))
    for seed, asked in enumerate([*plain, *reversed(plain)]):
        # Twice the same lengths: other pages, other values.
        for repeat in range(2):
            case = subject.case(asked, seed=2 * seed + repeat)
            if problems := case.problems(case.answer_of(bound)):
                return [f"{problem} in step {2 * seed + repeat + 1}, {describe(asked)}" for problem in problems]
    return []


def one_plan_for_all_layers(subject: Subject) -> Problems:
    """A plan serves every layer of its step: run again with other queries, keys and values."""
    first, second = (subject.case(MIXED[subject.phase], seed=seed) for seed in (1, 2))
    second = replace(second, batch=first.batch)
    if subject.phase is not Phase.VISION:
        second = replace(second, k=first.k * -0.5, v=first.v * -0.5)  # the pages of the first, other values
    bound = subject.backend(subject.phase, first.shape)
    plan = bound.plan(first.batch)
    for layer, case in enumerate((first, second)):
        answer = bound.run(plan, case.q, case.k, case.v, case.sinks)
        if problems := case.problems(answer):
            return [f"{problem} in layer {layer}" for problem in problems]
    return []


def unchanged_inputs(subject: Subject) -> Problems:
    """What is handed to `plan` and `run` has the same bits afterwards."""
    found = []
    for asked in (MIXED[subject.phase], *([DECODES["padding_rows"]] if subject.phase is Phase.DECODE else [])):
        case = subject.case(asked)
        before = _tensors(case, copy=True)
        case.answer(subject.backend)
        for name, now in _tensors(case).items():
            changed = int((now != before[name]).sum())
            found += [f"{changed} of {now.numel()} numbers of {name} were overwritten"] if changed else []
    return found


def batch_invariance(subject: Subject) -> Problems:
    """A sequence's answer has the same bits alone and in any company; only asked where it is claimed."""
    if subject.base.device_type not in subject.limits.batch_invariant:
        raise NotClaimed("the limits do not say batch_invariant on this device")
    case = subject.case(Workload(ALIKE[subject.phase]))
    bound = subject.backend(subject.phase, case.shape)
    count = len(case.batch.q_lens_cpu)
    alone = [_answers_of(bound, case, [row])[0] for row in range(count)]
    shuffle = random.Random(0)
    for size in (count, 2, 7, 8, 3):
        rows = shuffle.sample(range(count), min(size, count))
        for row, answer in zip(rows, _answers_of(bound, case, rows)):
            if not torch.equal(answer, alone[row]):
                differing = int((answer != alone[row]).sum())
                lens = (case.batch.q_lens_cpu[row], case.batch.kv_lens_cpu[row])
                return [
                    f"{differing} of {answer.numel()} numbers of a sequence of (q_len, kv_len) {lens} differ among "
                    f"{len(rows)} sequences from those of the sequence alone, by up to "
                    f"{float((answer.float() - alone[row].float()).abs().max()):.1e}"
                ]
    return []


def describe(asked: Workload) -> str:
    """A workload in words."""
    features = [
        *([f"a sliding window of {asked.window}"] if asked.window is not None else []),
        *([f"a soft cap of {asked.soft_cap:g}"] if asked.soft_cap is not None else []),
        *(["attention sinks"] if asked.sinks else []),
        *([] if asked.causal else ["attention both ways"]),
    ]
    lens = ", ".join(map(str, asked.lens[:6])) + (", ..." if len(asked.lens) > 6 else "")
    return f"{' and '.join(features) or 'plain attention'} over sequences of (q_len, kv_len) {lens}"


def part_of(case: Case, rows: Sequence[int]) -> Case:
    """The same call for some of the sequences."""
    lens = tuple((case.batch.q_lens_cpu[row], case.batch.kv_lens_cpu[row]) for row in rows)

    def pick(packed: Tensor) -> Tensor:
        parts = torch.split(packed, case.batch.q_lens_cpu)
        return torch.cat([parts[row] for row in rows])

    batch = make_batch(lens, case.batch.page_table[list(rows)], case.batch.num_pages, case.shape.device_type)
    k, v = (pick(case.k), pick(case.v)) if case.phase is Phase.VISION else (case.k, case.v)
    return replace(case, batch=batch, q=pick(case.q), k=k, v=v)


def _answers_of(bound: AttentionBackend[Any], case: Case, rows: Sequence[int]) -> list[Tensor]:
    part = part_of(case, rows)
    return list(torch.split(part.answer_of(bound), part.batch.q_lens_cpu))


def plain_shape(subject: Subject) -> Shape:
    """The base shape as its phase asks for it where a model has no features."""
    return Workload(()).bind(subject.phase, subject.base)


def _random_lens(draw: random.Random, phase: Phase) -> tuple[int, int]:
    q_len = 1 if phase is Phase.DECODE else draw.randint(1, 200)
    return q_len, q_len if phase is Phase.VISION else q_len + draw.choice((0, draw.randint(0, 300)))


def _tensors(case: Case, *, copy: bool = False) -> dict[str, Tensor]:
    """Every tensor of a call, by name."""
    named = {"q": case.q, "k": case.k, "v": case.v}
    named |= {f.name: x for f in fields(Batch) if isinstance(x := getattr(case.batch, f.name), Tensor)}
    return {name: tensor.clone() if copy else tensor for name, tensor in named.items()}
