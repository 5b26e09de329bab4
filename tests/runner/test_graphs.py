"""CUDA graphs: decode steps replayed give what decode steps launched give; asked for in vain they are refused."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from tessera import SamplingParams
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.errors import ConfigError
from tessera.runner.graphs import GraphLimits, StaticInputs
from tessera.runner.inputs import InputBuilder
from tessera.runner.parameters import parameters
from tessera.step import Step
from tessera.types import Request, Sequence

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0},
    # Of few tokens: made up weights find all alike, and draws would fall on borders that rounding moves.
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 7},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_k": 20, "seed": 1, "min_tokens": 3},
]


def make_engine(**settings: Any) -> Engine:
    flat = {"model": "dummy:135m", "max_model_len": 1024, "num_pages": 4096, "max_num_seqs": 48}
    return build_engine(EngineConfig.from_flat({**flat, **settings}))


def run(engine: Engine, count: int) -> dict[str, list[int]]:
    """Tokens of each of `count` requests, which come a few at a time."""
    random = Random(5)
    waiting = [
        Request(
            str(number),
            [random.randrange(40_000) for _ in range(random.randrange(1, 90))],
            SamplingParams(max_tokens=random.randrange(1, 50), ignore_eos=True, **KINDS[number % len(KINDS)]),
        )
        for number in range(count)
    ]
    found: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    while engine.has_work or waiting:
        for request in waiting[:3]:
            engine.add(request)
        waiting = waiting[3:]
        for output in engine.step():
            found[output.request_id] += output.token_ids
    return found


@pytest.mark.parametrize("most", [1, 3, 7, 64, 256, 1000])
def test_sizes_reach_the_most_sequences_and_pad_little(most: int) -> None:
    sizes = GraphLimits(most, 100, 16, 100).sizes()
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= max(3, count / 4)


def test_rows_of_a_greedy_step_keep_nothing_of_random_steps_before() -> None:
    """Also those that the step in between had not: eight random rows, then two greedy ones, then eight greedy ones."""
    static = StaticInputs(GraphLimits(8, 100, 16, 100), torch.device("cpu"))
    params = {True: SamplingParams(temperature=0.0), False: SamplingParams(temperature=1.0, top_p=0.5)}
    for greedy, count in ((False, 8), (True, 2), (True, 8), (False, 3), (True, 1)):
        sequences = [Sequence("r", i, [1], 1, params[greedy], i) for i in range(count)]
        static.write_parameters(Step.of(dict.fromkeys(sequences, 1)))
        assert static.parameters[:count].tolist() == parameters(sequences).tolist()
        assert not greedy or not static.parameters.any()


def test_a_step_is_written_to_the_first_rows_and_the_rest_is_padding() -> None:
    static = StaticInputs(GraphLimits(8, 64, 16, 100), torch.device("cpu"))
    builder = InputBuilder(100, 16, torch.device("cpu"))
    for count in (5, 2):
        sequences = [
            Sequence("r", i, [7] * 20 + [i], 1, params=SamplingParams(), seed=0, pages=[2 * i, 2 * i + 1])
            for i in range(count)
        ]
        for sequence in sequences:
            sequence.num_computed_tokens = 20
        static.write(builder.build_on_host(Step.of(dict.fromkeys(sequences, 1))), rows=6)
        assert static.token_ids[:6].tolist() == [*range(count), *[0] * (6 - count)]
        assert static.positions[:count].tolist() == [20] * count
        assert static.slots[:6].tolist() == [16 * (2 * i + 1) + 4 for i in range(count)] + [-1] * (6 - count)
        assert static.kv_lens64[:6].tolist() == [21] * count + [0] * (6 - count)
        assert static.sources[:6].tolist() == [-1] * 6
        assert static.page_table[:count, :2].tolist() == [[2 * i, 2 * i + 1] for i in range(count)]


def test_graphs_are_refused_where_the_device_has_none() -> None:
    with pytest.raises(ConfigError, match=r"--cuda-graphs asks .* but the device is cpu"):
        make_engine(device="cpu", cuda_graphs=True, attention="naive", num_pages=80)


@needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_replayed_steps_give_the_tokens_of_launched_ones(overlap: bool) -> None:
    """In float32, where rounding does not tip the choice; every kind of request in one batch."""
    settings = {"dtype": "float32", "attention": "triton"}
    launched = run(make_engine(cuda_graphs=False, overlap=False, **settings), 60)
    assert run(make_engine(cuda_graphs=True, overlap=overlap, **settings), 60) == launched


@needs_cuda
def test_the_proof_of_decoding_is_of_a_replay_and_the_choice_says_so() -> None:
    (decode,) = (c for c in make_engine(attention="triton", prove_attention=True).info.attention if c.phase == "decode")
    assert decode.reason.endswith("in CUDA graphs")
    assert all(any("paged_decode" in use.name for use in proof.symbols) for proof in decode.proofs)


@needs_cuda
def test_graphs_that_the_backend_does_not_allow_are_refused_and_left_out_where_nobody_asked() -> None:
    with pytest.raises(ConfigError, match="naive does not allow it"):
        make_engine(attention="naive", cuda_graphs=True)
    engine = make_engine(attention="naive")
    assert "not in CUDA graphs everywhere: naive does not allow it" in engine.info.attention[-1].reason
    assert len(run(engine, 5)) == 5
