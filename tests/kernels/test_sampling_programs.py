"""Rows of sampling that several programs share: tokens by an exact reference, however rows are cut up and listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.errors import ConfigError
from triton_interpreter import DEVICE, check_in_interpreter, needs_kernels, outside_interpreter

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels import sampling
from tessera.kernels.sampling import BLOCK, Workspace, sample
from tessera.kernels.sampling_rows import LISTED

Kind = tuple[float, float, float, float]
KINDS: list[Kind] = [
    (0.0, 0, 1, 0),
    (1.0, 0, 1, 0),
    (0.6, 0, 1, 0.05),
    (1.0, 50, 1, 0),
    (1.0, 1, 1, 0),
    (1.0, 700, 1, 0),
    (1.0, 10**9, 1, 0),
    (1.0, 0, 0.9, 0),
    (3.0, 0, 0.999, 0),
    (0.7, 0, 1e-40, 0),
    (1.5, 0, 0.8, 0.01),
    (0.8, 20, 0.9, 0),
    (2.0, 300, 0.5, 0.001),
    (1e-30, 5, 0.9, 0),
    (1e30, 3, 0.9, 0),
]
"""temperature, top_k, top_p, min_p"""


def make_table(kinds: list[Kind], seed: int = 0) -> Tensor:
    draws = torch.randint(0, 2**32, (len(kinds), 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor(kinds, dtype=torch.float64), draws.double() / 2**32], 1)


def random_logits(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def least_kept(logs: Tensor, amounts: Tensor, target: float) -> float:
    """The least of logs above which amounts add up to less than a target, by sorting."""
    ordered, order = logs.sort(descending=True)
    before = (amounts[order].cumsum(0) - amounts[order])[torch.searchsorted(-ordered, -ordered)]
    return float(ordered[before < target].min())


def exact_token(logits: Tensor, row: Tensor) -> int:
    """The token of one row, by sorting, in whole numbers of 2^-40; logits [vocab] float32, row [5]."""
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best, (temperature, top_k, top_p, min_p, draw) = int(logits.argmax()), row.tolist()
    if temperature == 0 or logits[best] == -torch.inf:
        return best
    rate = torch.tensor(1.4426950408889634) / torch.tensor(temperature)
    logs = torch.where(logits == logits[best], 0.0, (logits - logits[best]) * rate).nan_to_num(nan=-torch.inf)
    weights = logs.exp2()
    units = (torch.where(weights >= torch.tensor(min_p).float(), weights, 0.0).double() * 2**40).long()
    if 0 < top_k < len(logits):
        units = units * (logs >= least_kept(logs, torch.ones_like(units), top_k))
    if top_p < 1:
        units = units * (logs >= least_kept(logs, units, max(top_p * float(units.sum()), 1)))
    through = units.cumsum(0)
    return int((through <= int(through[-1]) * int(draw * 2**32) >> 32).sum())


def tokens(logits: Tensor, table: Tensor, **options: Any) -> list[int]:
    found: list[int] = sample(logits.to(DEVICE), table.to(DEVICE), **options).tolist()
    return found


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


def ties(rows: int, size: int) -> Tensor:
    return random_logits(rows, size).round()


def with_gaps(rows: int, size: int) -> Tensor:
    logits = random_logits(rows, size)
    logits[:, ::3], logits[:, 1::7], logits[:, 5::11] = -torch.inf, torch.nan, -1e30
    return logits


def within_one_bin(rows: int, size: int) -> Tensor:
    return torch.rand(rows, size, generator=torch.Generator().manual_seed(3)) * 0.01


def nearly_even(rows: int, size: int) -> Tensor:
    """Where a bound of what top-p drops would show if it were ten times too high."""
    return torch.rand(rows, size, generator=torch.Generator().manual_seed(4))


def one_part_alone(rows: int, size: int) -> Tensor:
    """All that is likely lies together, as a language's tokens may."""
    logits = random_logits(rows, size)
    logits[:, : size - size // 9] -= 60
    return logits


def of_any_size(rows: int, size: int) -> Tensor:
    return random_logits(rows, size) * torch.logspace(-38, 36, rows)[:, None]


def with_infinities(rows: int, size: int) -> Tensor:
    logits = random_logits(rows, size)
    logits[:, 7], logits[:, size // 2] = torch.inf, torch.inf
    return logits


@needs_kernels
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "make", [random_logits, ties, with_gaps, within_one_bin, nearly_even, one_part_alone, of_any_size, with_infinities]
)
@pytest.mark.parametrize("size", [300, 2 * BLOCK + 77])
def test_tokens_are_those_of_sorting_in_whole_numbers(make: Any, size: int) -> None:
    # The interpreter takes long for many blocks: of those kinds that are searched for a cut, and one that is not.
    kinds = KINDS if DEVICE == "cuda" or size < BLOCK else [*KINDS[1:4], KINDS[7], KINDS[12]]
    logits, table = make(len(kinds), size), make_table(kinds)
    expected = [exact_token(*pair) for pair in zip(logits, table, strict=True)]
    found = tokens(logits, table)
    # A device's exp2 may differ by a last place, and a draw may fall in between.
    assert sum(mine != theirs for mine, theirs in zip(found, expected, strict=True)) <= (DEVICE == "cuda")


@needs_kernels
@pytest.mark.timeout(180)
@pytest.mark.parametrize("size", [40, 5 * 128, 2 * BLOCK + 77])
def test_any_number_of_programs_gives_the_same_tokens(size: int) -> None:
    kinds = [*KINDS[:4], *KINDS[7:9], *KINDS[11:13]] if DEVICE == "cuda" else [*KINDS[2:4], KINDS[7], KINDS[11]]
    logits, table = random_logits(len(kinds), size), make_table(kinds, seed=1)
    first = tokens(logits, table)
    for programs in (1, 2, 5):
        assert tokens(logits, table, programs_per_row=programs) == first
    many = 64 if DEVICE == "cuda" else 16  # the interpreter takes long for them
    assert tokens(logits[1::2], table[1::2].contiguous(), programs_per_row=many) == first[1::2]


@needs_kernels
@pytest.mark.timeout(180)
@pytest.mark.parametrize("make", [random_logits, ties, within_one_bin])
def test_a_list_without_room_gives_the_same_tokens(make: Any) -> None:
    logits, table = make(len(KINDS), BLOCK + 77), make_table(KINDS, seed=2)
    assert tokens(logits, table, room=2, programs_per_row=2) == tokens(logits, table)


@needs_kernels
@pytest.mark.timeout(180)
@pytest.mark.parametrize("room", [8192, None])
def test_150_thousand_equal_logits_are_all_kept_and_drawn_evenly(room: int | None) -> None:
    size = 151_936
    draws = torch.tensor([0.0, 0.25, 1 - 2**-32], dtype=torch.float64)
    table = torch.cat([torch.tensor([[1, 0, 0.5, 0], [1, 9, 1, 0], [1, 9, 0.5, 0]]).double(), draws[:, None]], 1)
    assert tokens(torch.full((3, size), -7.0), table, room=room) == [0, size // 4, size - 1]


@needs_kernels
def test_what_is_in_the_workspace_before_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, table = random_logits(len(KINDS), 1000), make_table(KINDS)
    first, allocate = tokens(logits, table), Workspace.allocate

    def allocate_dirty(*arguments: Any) -> Workspace:
        return Workspace(*(tensor.fill_(77) for tensor in allocate(*arguments)))

    monkeypatch.setattr(Workspace, "allocate", allocate_dirty)
    assert tokens(logits, table) == first


@needs_kernels
@pytest.mark.parametrize("programs", [1, 16])
def test_few_tokens_are_counted_and_fewer_listed(monkeypatch: pytest.MonkeyPatch, programs: int) -> None:
    """Where a cut lies is bounded from below before anything is counted, and then down to a bin."""
    kept, allocate = [], Workspace.allocate

    def allocate_and_keep(*arguments: Any) -> Workspace:
        kept.append(allocate(*arguments))
        return kept[-1]

    monkeypatch.setattr(Workspace, "allocate", allocate_and_keep)
    logits = random_logits(1, 16 * BLOCK)
    table = make_table([(1, 50, 1, 0), (1, 0, 0.9, 0), (1, 50, 0.9, 0)])
    tokens(logits.expand(3, -1), table, programs_per_row=programs)
    (workspace,) = kept
    assert 50 <= int(workspace.counts[0].sum()) < 16 * BLOCK // 20
    assert torch.equal(workspace.counts[0], workspace.counts[2])
    counted, total = workspace.masses[1].sum() / 2**40, (logits[0].double() - logits.max()).exp().sum()
    assert 0.9 * total < counted < 0.999 * total
    listed = workspace.marks[:, int(LISTED)].tolist()
    assert 1 <= listed[0] < 20 and 1 <= listed[1] < 1000 and 1 <= listed[2] < 100


@needs_kernels
def test_a_wrong_number_of_programs_or_no_room_is_refused() -> None:
    logits, table = random_logits(1, 40), make_table(KINDS[:1])
    for options in ({"programs_per_row": 0}, {"programs_per_row": 129}, {"room": 0}):
        with pytest.raises(ConfigError, match="programs a row"):
            tokens(logits, table, **options)


def test_rows_are_cut_up_while_multiprocessors_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_processors", lambda _: 132)
    for size in (40, 49_152, 151_936):
        for rows in (1, 8, 32, 128, 256, 1000):
            programs = sampling._programs_per_row(rows, size, torch.device("cuda"))
            assert 1 <= programs <= 128 and (programs == 1 or rows * programs <= 2 * 132)
            assert (programs - 1) * BLOCK < size
    assert sampling._programs_per_row(1, 151_936, torch.device("cuda")) == 75
    assert sampling._programs_per_row(128, 151_936, torch.device("cuda")) == 2
