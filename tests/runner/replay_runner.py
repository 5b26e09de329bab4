"""Replays without a GPU: a stand-in for graphs computes the same call on the same tensors, and nothing else is new.

The model is one layer of attention over real pages, whose backend reads lengths and pages from tensors alone: what was
not sent, or lies in the wrong place, is another token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from tessera.runner.graph_sizes import GraphLimits
from tessera.runner.parameters import parameters
from tessera.runner.runner import Runner
from tessera.runner.sampler import Sampler
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.types import EngineInfo, Output, Request, SamplingParams

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


@contextmanager
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs, their memory and the sampling kernel by what runs on a CPU."""
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
