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
from tessera.runner.graph_sizes import GraphLimits, GraphSize
from tessera.runner.inputs import InputBuilder
from tessera.runner.parameters import SamplingRows, parameters
from tessera.runner.static_inputs import GraphInputs, StaticInputs
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
    limits = GraphLimits(most, 100, 16, 100)
    sizes = limits.decodes
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= max(3, count / 4)
        assert limits.size(count, 0, 0, 77) == GraphSize(size, 0, 0, 100)
    assert limits.size(most + 1, 0, 0, 77) is None


def decodes(count: int, params: SamplingParams) -> tuple[Step, list[Sequence]]:
    """A step of so many sequences of 21 tokens, each on two pages of 16."""
    sequences = [
        Sequence("r", i, [7] * 20 + [i], 1, params, seed=i, pages=[2 * i, 2 * i + 1], num_computed_tokens=20)
        for i in range(count)
    ]
    return Step.of(dict.fromkeys(sequences, 1)), sequences


def test_rows_of_a_greedy_step_keep_nothing_of_random_steps_before() -> None:
    """Also those that the step in between had not: eight random rows, then two greedy ones, then eight greedy ones."""
    static = StaticInputs(GraphLimits(8, 100, 16, 100), torch.device("cpu"))
    builder, rows = InputBuilder(100, 16, torch.device("cpu")), SamplingRows.of([])
    inputs = {count: GraphInputs(GraphSize(count, 0, 0, 100), static) for count in (4, 8)}
    params = {True: SamplingParams(temperature=0.0), False: SamplingParams(temperature=1.0, top_p=0.5)}
    for greedy, count in ((False, 8), (True, 2), (True, 8), (False, 3), (True, 1)):
        step, sequences = decodes(count, params[greedy])
        rows = rows.following(sequences)
        written = inputs[4 if count <= 4 else 8]
        written.write(builder.build_on_host(step), rows, step.kv_lens)
        assert written["parameters"][:count].tolist() == parameters(sequences).tolist()
        assert not written["parameters"][count:].any()
        assert greedy != bool(written["parameters"].any())


def test_a_step_is_written_to_the_first_rows_and_the_rest_is_padding() -> None:
    static = StaticInputs(GraphLimits(8, 64, 16, 100), torch.device("cpu"))
    builder, inputs = InputBuilder(100, 16, torch.device("cpu")), GraphInputs(GraphSize(6, 0, 0, 64), static)
    for count in (5, 2):
        step, sequences = decodes(count, SamplingParams())
        inputs.write(builder.build_on_host(step), SamplingRows.of(sequences), step.kv_lens)
        assert inputs["token_ids"].tolist() == [*range(count), *[0] * (6 - count)]
        assert inputs["positions"].tolist() == [20] * count + [0] * (6 - count)
        assert inputs["slots"].tolist() == [16 * (2 * i + 1) + 4 for i in range(count)] + [-1] * (6 - count)
        assert inputs["decode_lens"].tolist() == [21] * count + [0] * (6 - count)
        assert inputs["sources"].tolist() == [-1] * 6
        assert inputs["decode_table"][:count, :2].tolist() == [[2 * i, 2 * i + 1] for i in range(count)]


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
