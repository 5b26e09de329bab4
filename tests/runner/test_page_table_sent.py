"""Page tables of decodes stay on the device from step to step, and are sent where they changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from torch import Tensor

from replay_runner import MAX_LEN, PAGE_SIZE, make_runner, stand_ins
from tessera.runner.graph_sizes import GraphSize
from tessera.runner.static_inputs import spans
from tessera.step import Step
from tessera.types import SamplingParams
from tessera.types import Sequence as TokenSequence


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stand_ins(monkeypatch):
        yield


class Driver:
    """Steps of one sequence each way, by hand; counts what is sent."""

    def __init__(self) -> None:
        self.runner, self.sent = make_runner(60, replayed=True, most_tokens=0), list[int]()
        self._same: list[TokenSequence] = []
        graphs = self.runner._graphs
        assert graphs is not None
        self.static = graphs._static
        send = self.static.staging.send

        def count(source: Tensor, there: Tensor) -> None:
            self.sent.append(len(source))
            send(source, there)

        self.static.staging.send = count  # type: ignore[method-assign]

    def decode(self, *sequences: TokenSequence, anew: bool = False) -> bool:
        """One step of a token each; whether the page table was sent, and right in any case.

        As a scheduler's, steps of the same sequences have the very same list of them, unless `anew`.
        """
        if anew or self._same != [*sequences]:
            self._same = [*sequences]
        step = replace(Step.of(dict.fromkeys(sequences, 1)), sequences=self._same, sampling=self._same)
        before = len(self.sent)
        result = self.runner.run(step)
        for row, (each, token) in enumerate(zip(sequences, result.token_ids)):
            each.num_computed_tokens += 1
            each.token_ids.append(token)
            count = -(-each.num_computed_tokens // PAGE_SIZE)
            assert self.static.page_table[row, :count].tolist() == each.pages[:count]
        assert len(self.sent) == before + 1, "one copy a step"
        without = spans(GraphSize(len(sequences), 0, 0, MAX_LEN), PAGE_SIZE)[-1].end
        return self.sent[-1] > without


def a_sequence(number: int, num_tokens: int) -> TokenSequence:
    pages = list(range(16 * number, 16 * number + 16))
    tokens = [number + 1] * num_tokens
    return TokenSequence("r", number, tokens, num_tokens, SamplingParams(temperature=0.0), 0, pages, num_tokens - 1)


def test_the_page_table_is_sent_only_when_an_entry_changed() -> None:
    """Of one sequence in one of four steps; also when another size, or a launched step, came in between."""
    driver, one, two = Driver(), a_sequence(0, 5), a_sequence(1, 3)
    assert [driver.decode(one) for _ in range(9)] == [True, *[False] * 3, True, *[False] * 3, True]
    assert driver.decode(two, one), "other rows"
    assert [driver.decode(two, one) for _ in range(3)] == [False, True, True], "a page of each"
    assert driver.decode(one), "a graph of fewer rows reads the same table"
    assert not driver.decode(one)
    prompt = replace(a_sequence(2, 9), num_computed_tokens=0)
    driver.runner.run(Step.of({prompt: 9}))  # launched, for these graphs have no prompts
    assert driver.decode(one)
    one.pages = one.pages[::-1]  # preempted, and back in other pages
    assert driver.decode(one, anew=True)
