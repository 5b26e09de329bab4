"""Overlap: steps prepared before results are in give every request the tokens it would have had."""

from __future__ import annotations

from random import Random

import pytest

from tessera import SamplingParams
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.types import Output, Request

VOCAB_SIZE = 49_152
FREQUENT = [28, 30, 198, 260, 282, 284]
"""A comma, a full stop, a new line, " the", " of" and " and": where many answers stop before their last token."""


def make_engine(overlap: bool, **settings: object) -> Engine:
    flat = {"device": "cpu", "dtype": "float32", "attention": "torch_sdpa", "max_model_len": 512}
    return build_engine(EngineConfig.from_flat({**flat, "overlap": overlap, **settings}))


def make_requests(count: int, most_tokens: int) -> list[Request]:
    """Prompts of all lengths, some that begin alike, greedy and sampled, with every kind of wish."""
    random = Random(3)
    common = [random.randrange(VOCAB_SIZE) for _ in range(40)]
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 0.0, "prompt_logprobs": 1},
        {"temperature": 0.7, "seed": 1, "min_tokens": 3, "stop_token_ids": FREQUENT},
    ]
    requests = []
    for number in range(count):
        own = [random.randrange(VOCAB_SIZE) for _ in range(random.randrange(1, 60))]
        prompt = common[: random.choice((0, 33))] + own
        params = SamplingParams(max_tokens=random.randrange(1, most_tokens), **kinds[number % len(kinds)])  # type: ignore[arg-type]
        requests.append(Request(str(number), prompt, params))
    return requests


def run(engine: Engine, requests: list[Request], abort_at: dict[int, str]) -> dict[str, list[Output]]:
    """Outputs of each request; requests come a few at a time, and some are aborted after so many steps."""
    found: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    waiting, step = list(requests), 0
    while engine.has_work or waiting:
        for request in waiting[:2]:
            engine.add(request)
        waiting = waiting[2:]
        for output in engine.step():
            found[output.request_id].append(output)
        step += 1
        if victim := abort_at.get(step):
            engine.abort(victim)
    return found


def ranks(outputs: list[Output]) -> list[int]:
    """Of every token that came with logprobs, those of the prompt first."""
    prompt = [entry.rank for output in outputs for entry in output.prompt_logprobs or [] if entry]
    return prompt + [entry.rank for output in outputs for entry in output.logprobs or []]


@pytest.mark.parametrize(
    "settings", [{}, {"num_pages": 90, "page_size": 2, "max_model_len": 180}, {"max_num_batched_tokens": 32}]
)
def test_the_real_model_says_the_same_with_and_without_overlap(settings: dict[str, int]) -> None:
    """Mixed requests in a usual cache, in one so small that sequences are preempted, and with small steps."""
    requests = make_requests(8, 60) if "num_pages" in settings else make_requests(8, 16)
    aborted = {3: "1", 6: "7"}
    engines = [make_engine(overlap, **settings) for overlap in (False, True)]
    plain, overlapped = (run(engine, requests, aborted) for engine in engines)
    for request in requests:
        tokens, same = ([t for o in found[request.request_id] for t in o.token_ids] for found in (plain, overlapped))
        if request.request_id in aborted.values():
            shorter = min(len(tokens), len(same))
            assert tokens[:shorter] == same[:shorter]
            continue
        assert tokens == same
        first, second = (found[request.request_id][-1].finish_reason for found in (plain, overlapped))
        assert first == second is not None
        entries = [
            [e.rank for o in found[request.request_id] for e in o.logprobs or []] for found in (plain, overlapped)
        ]
        assert entries[0] == entries[1]
    for engine in engines:
        status = engine.status()
        assert (status.running, status.waiting, status.pages_free) == (0, 0, status.pages_total)
    if "num_pages" in settings:
        assert all(engine.status().preemptions for engine in engines)


def test_with_overlap_a_step_is_begun_before_the_one_before_it_is_taken_in() -> None:
    """Without it the first step already gives a token."""
    request = Request("a", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=4))
    given: dict[bool, list[int]] = {}
    for overlap in (False, True):
        engine = make_engine(overlap)
        engine.add(request)
        given[overlap] = [sum(len(o.token_ids) for o in engine.step()) for _ in range(5)]
    assert given == {False: [1, 1, 1, 1, 0], True: [0, 1, 1, 1, 1]}
