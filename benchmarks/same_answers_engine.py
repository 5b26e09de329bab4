"""What `same_answers.py` asks the engine: mixed greedy requests, some of them aborted, and the answers to them."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tessera.bench.quality.text import PROMPTS
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.text.tokenizer import Tokenizer
from tessera.types import Request, SamplingParams

Ids = list[list[int]]
ABORTED_SHARE = 0.15


@dataclass(frozen=True)
class Asked:
    """A request, and after how many of its own tokens it is aborted; None: never."""

    request: Request
    abort_after: int | None = None


@dataclass
class Answer:
    """What was said, and why it ended: stop, length or aborted; None where the engine never said."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True)
class Run:
    """All answers of one engine, in the order of the requests, and what it took."""

    answers: list[Answer]
    preemptions: int
    graphs: int
    """CUDA graphs recorded, each when a step was first replayed by it."""
    attention: dict[str, list[str]]
    """Phase -> the backends that serve it."""
    page_size: int
    num_pages: int
    steps: int
    seconds: float
    """Without the engine's start, with whatever is compiled or recorded on the way."""

    def count(self, finish: str) -> int:
        """Answers that ended so."""
        return sum(answer.finish == finish for answer in self.answers)


def mixed_requests(tokenizer: Tokenizer, count: int, longest: tuple[int, int], seed: int) -> list[Asked]:
    """`count` requests, always the same for a seed: chats, which mostly end by themselves, texts, ids by chance, and
    texts that begin alike; prompts of 1 to `longest[0]` tokens, answers of 1 to `longest[1]`, a share aborted.
    """
    source = random.Random(seed)
    texts = [tokenizer.encode(text) for text in PROMPTS]
    common = _joined(texts, longest[0], source)
    asked = []
    for number in range(count):
        length = source.randint(1, longest[0])
        if number % 4 == 0:
            chat = [{"role": "user", "content": source.choice(PROMPTS)}]
            prompt = tokenizer.encode(tokenizer.render_chat(chat), add_special_tokens=False)[-longest[0] :]
        elif number % 4 == 1:
            prompt = _joined(texts, length, source)
        elif number % 4 == 2:
            prompt = [source.randrange(tokenizer.vocab_size) for _ in range(length)]
        else:
            shared = source.randint(0, length)
            prompt = common[:shared] + _joined(texts, length - shared, source)
        num_tokens = source.randint(1, longest[1])
        abort_after = source.randrange(1, num_tokens) if num_tokens > 1 and source.random() < ABORTED_SHARE else None
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        asked.append(Asked(Request(str(number), prompt, params), abort_after))
    return asked


def _joined(texts: Ids, length: int, source: random.Random) -> list[int]:
    """Texts by chance, one after another, cut to `length` tokens."""
    joined: list[int] = []
    while len(joined) < length:
        joined += source.choice(texts)
    return joined[:length]


def equal_length_prompts(prompts: Ids, group: int) -> list[Ids]:
    """Prompts in groups of like length, brought to that of the longest of the group: a batch then needs no padding.

    A shorter one is preceded by the beginning of the longest, so that all still end as they did.
    """
    ordered = sorted(prompts, key=len)
    groups = [ordered[first : first + group] for first in range(0, len(ordered), group)]
    return [[members[-1][: len(members[-1]) - len(prompt)] + prompt for prompt in members] for members in groups]


def fixed_requests(prompts: Ids, num_tokens: int) -> list[Asked]:
    """One request a prompt, of exactly so many tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return [Asked(Request(str(number), prompt, params)) for number, prompt in enumerate(prompts)]


def run(settings: dict[str, Any], asked: list[Asked], arriving: int) -> Run:
    """Build an engine, answer all requests, `arriving` new ones a step, and free it; TesseraError where it cannot."""
    # With 4-bit weights a step of few tokens would round otherwise than one of many, graphs and overlap or not.
    engine = build_engine(EngineConfig.from_flat(settings | {"cpu_four_bits": False}))
    started = time.perf_counter()
    answers = _answer(engine, asked, arriving)
    seconds = time.perf_counter() - started
    info, status = engine.info, engine.status()
    if (status.running, status.waiting, status.pages_free) != (0, 0, status.pages_total):
        raise RuntimeError(f"the engine is not empty after its last answer: {status}")
    found = Run(
        answers=answers,
        preemptions=status.preemptions,
        graphs=_graphs_recorded(engine),
        attention={choice.phase: choice.backends for choice in info.attention},
        page_size=info.page_size,
        num_pages=info.num_pages,
        steps=status.steps,
        seconds=seconds,
    )
    del engine
    free_memory()
    return found


def _answer(engine: Engine, asked: list[Asked], arriving: int) -> list[Answer]:
    found = {each.request.request_id: Answer() for each in asked}
    aborts = {each.request.request_id: each.abort_after for each in asked}
    waiting = list(reversed(asked))
    while engine.has_work or waiting:
        for _ in range(min(arriving, len(waiting))):
            engine.add(waiting.pop().request)
        for output in engine.step():
            answer = found[output.request_id]
            answer.tokens += output.token_ids
            if output.finish_reason is not None:
                answer.finish = str(output.finish_reason)
            elif len(answer.tokens) == aborts[output.request_id]:
                engine.abort(output.request_id)
                answer.finish = "aborted"
    return list(found.values())


def _graphs_recorded(engine: Engine) -> int:
    """A benchmark may look where a user cannot."""
    executor: Any = engine._executor
    return sum(len(graphs._graphs) for graphs in executor._runner._graphs)


def free_memory() -> None:
    """Give back what nobody holds, so that the next engine finds it free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
