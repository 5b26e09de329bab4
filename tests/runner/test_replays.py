"""Replayed steps say what launched ones say, also where memory is too little to record them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from replay_runner import CallAgain, capture_call, make_engine, run, stand_ins, told


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with stand_ins(monkeypatch):
        yield


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_pages", [30, 200])
def test_replayed_steps_say_what_launched_ones_say(overlap: bool, num_pages: int) -> None:
    """Of every kind of request, with prompts, aborts, steps that are launched in between, and pages that run out."""
    sizes, preemptions, aborted = set(), 0, {9: "2", 21: "7"}
    for seed in range(5):
        launched = run(make_engine(num_pages, replayed=False, overlap=False)[0], seed, aborted)
        engine, runner = make_engine(num_pages, replayed=True, overlap=overlap)
        for name, outputs in run(engine, seed, aborted).items():
            tokens, same = told(outputs), told(launched[name])
            if name in aborted.values():  # how far it came by then is a matter of overlap
                shorter = min(len(tokens[0]), len(same[0]))
                assert tokens[0][:shorter] == same[0][:shorter]
            else:
                assert tokens == same
        assert runner._graphs is not None
        sizes.update(runner._graphs.sizes)
        preemptions += engine.status().preemptions
    assert {size.decodes for size in sizes if not size.prompts} == {1, 2, 4, 8}
    assert {size.decodes for size in sizes if size.prompts} == {0, 8}
    assert (preemptions > 0) == (num_pages == 30)


@pytest.mark.parametrize(("room", "ending"), [(0, False), (1, True), (2, False), (3, True), (4, False), (5, True)])
def test_where_no_memory_is_left_for_a_graph_steps_are_launched(
    room: int, ending: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those recorded before are replayed still; also where ending the capture fails for what the memory began."""
    monkeypatch.setattr("replay_runner.KINDS", [{"temperature": 0.0}])  # so that all steps overlap
    launched = run(make_engine(200, replayed=False, overlap=False)[0], 3, {})
    asked = 0

    def capture_little(
        call: Callable[[], Tensor], warm_up: Callable[[], object], pool: Any
    ) -> tuple[CallAgain, Tensor]:
        nonlocal asked
        asked += 1
        if asked <= room:
            return capture_call(call, warm_up, pool)
        warm_up()  # which writes over what the step before sampled
        try:
            raise (torch.OutOfMemoryError if room % 2 else RuntimeError)("CUDA error: out of memory")
        finally:
            if ending:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr("tessera.runner.graphs.capture", capture_little)
    engine, runner = make_engine(200, replayed=True, overlap=True)
    found = run(engine, 3, {})
    assert {name: told(outputs) for name, outputs in found.items()} == {
        name: told(outputs) for name, outputs in launched.items()
    }
    assert runner._graphs is not None
    assert (len(runner._graphs.sizes), asked) == (room, room + 1)
    assert caplog.text.count("no memory is left to record") == 1


def test_an_error_that_is_not_of_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture_nothing(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("tessera.runner.graphs.capture", capture_nothing)
    with pytest.raises(RuntimeError, match="illegal"):
        run(make_engine(200, replayed=True, overlap=False)[0], 3, {})
