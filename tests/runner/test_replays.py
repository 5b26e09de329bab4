"""Replays without a GPU: a stand-in for graphs computes the same call on the same tensors, and nothing else is new.

The model is one layer of attention over real pages, whose backend reads lengths and pages from tensors alone: what was
not sent, or lies in the wrong place, is another token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tessera.attention.backends.naive import Naive
from tessera.attention.contract import AttentionBackend, Batch, Limits, Phase, Shape
from tessera.attention.step import Attention
from tessera.engine.engine import Engine
from tessera.runner import graphs as graphs_module
from tessera.runner.graph_sizes import GraphLimits, GraphSize
from tessera.runner.parameters import parameters
from tessera.runner.runner import Runner
from tessera.runner.sampler import Sampler
from tessera.runner.static_inputs import spans
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.step import Step
from tessera.types import EngineInfo, Output, Request, SamplingParams
from tessera.types import Sequence as TokenSequence

PAGE_SIZE, VOCAB_SIZE, MAX_LEN, WIDTH = 4, 60, 64, 16
SHAPE = Shape(2, 1, WIDTH // 2, 0.3, torch.float32, "cpu", page_size=PAGE_SIZE)
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "seed": 7},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 1, "min_tokens": 3, "stop_token_ids": [1, 2, 3, 4, 5, 6]},
    {"temperature": 0.0, "prompt_logprobs": 1},
]


class ByTensors(Naive):
    """Naive attention that looks at what stands in its batch's tensors when it runs, as kernels in graphs do."""

    limits: ClassVar[dict[Phase, Limits]] = {phase: replace(each, graphs=True) for phase, each in Naive.limits.items()}

    def plan(self, batch: Batch) -> Any:
        """Keep the batch."""
        return batch

    def run(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Plan with what is there now; zeros for tokens of nobody."""
        q_lens, kv_lens = plan.cu_q_lens.diff().tolist(), plan.kv_lens.tolist()
        there = replace(plan, q_lens_cpu=q_lens, kv_lens_cpu=kv_lens)
        out = torch.zeros_like(q)
        parts = super().plan(there)
        if parts:
            answer = super().run(parts, q, k, v, sinks)
            out[: len(answer)] = answer
        return out


class Recordable(Attention):
    """Attention that says keys are written by a kernel that a graph may record."""

    def graphs_refused(self, phase: Phase, backends: Sequence[AttentionBackend[Any]]) -> list[str]:  # noqa: ARG002
        """Never."""
        return []


class OneLayer:
    """Embeddings, one layer of attention, logits."""

    spec = SimpleNamespace(eos_token_ids=[0])

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self._embedding = torch.randn(VOCAB_SIZE, WIDTH, generator=made)
        self._places = torch.randn(MAX_LEN, WIDTH, generator=made)
        self._head = torch.randn(WIDTH, VOCAB_SIZE, generator=made)

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """[tokens, WIDTH]"""
        hidden = self._embedding[token_ids] + self._places[positions]
        keys = hidden[:, None, : WIDTH // 2]
        answer = attend(0, hidden.view(-1, 2, WIDTH // 2), keys, hidden[:, None, WIDTH // 2 :])
        after: Tensor = hidden + 3 * answer.reshape(-1, WIDTH)
        return after

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, VOCAB_SIZE]"""
        logits: Tensor = hidden @ self._head
        return logits


class CallAgain:
    """What stands for a graph: the same call, into the same answer."""

    def __init__(self, call: Callable[[], Tensor], answer: Tensor) -> None:
        self._call, self._answer = call, answer

    def replay(self) -> None:
        """Again."""
        self._answer.copy_(self._call())


def capture_call(call: Callable[[], Tensor], warm_up: Callable[[], object], pool: Any) -> tuple[CallAgain, Tensor]:
    """As attention.cuda.capture."""
    assert pool is None
    warm_up()
    answer = call()
    return CallAgain(call, answer), answer


def choose(_: Sampler, logits: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """As the kernel, of temperature, top_k and draw alone."""
    temperature, top_k, draw = table[:, :1], table[:, 1].long().clamp(1, VOCAB_SIZE), table[:, 4:]
    floor = logits.sort(-1, descending=True).values.gather(1, top_k[:, None] - 1)
    kept = torch.where(logits >= floor, logits / temperature.clamp(min=1e-3), -torch.inf).double().softmax(-1)
    drawn = torch.searchsorted(kept.cumsum(-1), draw.contiguous(), right=True)[:, 0].clamp(max=VOCAB_SIZE - 1)
    chosen = torch.where(temperature[:, 0] > 0, drawn, logits.argmax(-1))
    return chosen if out is None else out.copy_(chosen)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small
    monkeypatch.setattr(graphs_module, "capture", capture_call)
    monkeypatch.setattr(graphs_module, "graph_pool", lambda: None)
    monkeypatch.setattr(Sampler, "choose_fused", choose)
    monkeypatch.setattr(
        Sampler, "_choose", lambda self, logits, rows: choose(self, logits, torch.from_numpy(parameters(rows)))
    )
    yield
    torch.set_num_threads(threads)


def make_runner(num_pages: int, *, replayed: bool, most_tokens: int = 64) -> Runner:
    attention = Recordable({phase: [ByTensors(phase, SHAPE)] for phase in (Phase.PREFILL, Phase.DECODE)}, [0])
    k_pages, v_pages = ([torch.zeros(num_pages, PAGE_SIZE, 1, WIDTH // 2)] for _ in range(2))
    limits = GraphLimits(8, MAX_LEN, PAGE_SIZE, num_pages, most_tokens, 999)
    model: Any = OneLayer()
    return Runner(model, attention, k_pages, v_pages, torch.device("cpu"), limits if replayed else None)


def make_engine(num_pages: int, *, replayed: bool, overlap: bool) -> tuple[Engine, Runner]:
    runner = make_runner(num_pages, replayed=replayed)
    limits = SchedulerLimits(8, 40, MAX_LEN, PAGE_SIZE)
    info = EngineInfo(
        "toy", "none", "float32", "cpu", VOCAB_SIZE, MAX_LEN, [0], PAGE_SIZE, num_pages, 8, 40, []
    )  # fmt: skip
    return Engine(runner, Scheduler(limits, PagePool(num_pages), {0}), info, overlap=overlap), runner


def run(engine: Engine, seed: int, aborted: dict[int, str]) -> dict[str, list[Output]]:
    """Outputs of requests that come a few at a time; some are aborted after so many steps."""
    random, number = Random(seed), 0
    found: dict[str, list[Output]] = {}
    while engine.has_work or number < 24:
        for _ in range(random.randrange(3) if number < 24 else 0):
            prompt = [random.randrange(1, VOCAB_SIZE) for _ in range(random.randrange(1, 30))]
            params = SamplingParams(max_tokens=random.randrange(3, 34), **random.choice(KINDS))
            engine.add(Request(str(number), prompt, params))
            found[str(number)] = []
            number += 1
        for output in engine.step():
            found[output.request_id].append(output)
        if victim := aborted.get(engine.status().steps):
            engine.abort(victim)
    return found


def told(outputs: list[Output]) -> tuple[list[int], list[int]]:
    """Tokens, and ranks of all logprobs."""
    of_prompt = [each.rank for output in outputs for each in output.prompt_logprobs or [] if each]
    ranks = [each.rank for output in outputs for each in output.logprobs or []]
    return [token for output in outputs for token in output.token_ids], of_prompt + ranks


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


@pytest.mark.parametrize(("room", "ending"), [(0, False), (1, True), (2, False), (3, True), (4, False), (5, True)])
def test_where_no_memory_is_left_for_a_graph_steps_are_launched(
    room: int, ending: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those recorded before are replayed still; also where ending the capture fails for what the memory began."""
    monkeypatch.setattr(sys.modules[__name__], "KINDS", [{"temperature": 0.0}])  # so that all steps overlap
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
