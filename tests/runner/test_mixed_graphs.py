"""Steps with prompts as CUDA graphs: what is written for one is the step itself, and replays say what launches say."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from tessera import SamplingParams
from tessera.attention.contract import Phase
from tessera.runner.graph_sizes import GraphLimits, GraphSize
from tessera.runner.inputs import InputBuilder
from tessera.runner.parameters import SamplingRows, parameters
from tessera.runner.static_inputs import PADDING_SLOT, GraphInputs, StaticInputs, spans, storage_bytes
from tessera.step import Step
from tessera.types import Sequence
from test_graphs import make_engine, needs_cuda, run

PAGE_SIZE = 16
LIMITS = GraphLimits(
    max_num_seqs=40, max_model_len=1000, page_size=PAGE_SIZE, num_pages=500, most_tokens=256, most_rows=10_000
)


def sequence(number: int, computed: int, new: int, unknown: int = 0) -> Sequence:
    """Some tokens in the cache, some new ones, and some that this step leaves for later."""
    random, length = Random(number), computed + new + unknown
    made = Sequence(
        "r", number, [random.randrange(900) for _ in range(length)], length, SamplingParams(), number,
        pages=[50 * number + page for page in range(-(-length // PAGE_SIZE))],
    )  # fmt: skip
    made.num_computed_tokens = computed
    return made


def step() -> Step:
    """Two decodes, a whole prompt, the rest of one and a chunk that samples nothing."""
    made = [sequence(1, 30, 1), sequence(2, 64, 1), sequence(3, 0, 20), sequence(4, 48, 17), sequence(5, 16, 40, 9)]
    return Step.of(dict(zip(made, (1, 1, 20, 17, 40))))


def test_a_step_is_written_as_it_is_and_the_rest_is_padding() -> None:
    builder = InputBuilder(500, PAGE_SIZE, torch.device("cpu"))
    host = builder.build_on_host(step())
    size = LIMITS.size(2, 77, 3, 68)
    assert size == GraphSize(16, 128, 4, 512)
    static = StaticInputs(LIMITS, torch.device("cpu"))
    for memory in (static.storage, *static.staging.buffers):
        memory.fill_(77)
    inputs = GraphInputs(size, static)
    inputs.write(host, SamplingRows.of(step().sampling), host.kv_lens[host.samples])
    assert inputs["parameters"][:4].tolist() == parameters(step().sampling).tolist()
    assert not inputs["parameters"][4:].any()
    real = [0, 1, *range(16, 16 + 77)]
    expected = builder.build(step())
    for name in ("token_ids", "positions", "slots"):
        assert inputs[name][real].tolist() == getattr(expected, name).tolist()
    unreal = np.setdiff1d(np.arange(16 + 128), real)
    assert set(inputs["slots"][unreal].tolist()) == {PADDING_SLOT} and set(inputs["sources"].tolist()) == {-1}
    rows = torch.tensor(real)[expected.sampling_rows].tolist()
    assert inputs["sampling_rows"].tolist() == [*rows, *[0] * (20 - len(rows))] and len(rows) == 4
    decodes, prompts = expected.batches[Phase.DECODE][1], expected.batches[Phase.PREFILL][1]
    assert inputs["decode_lens"].tolist() == [*decodes.kv_lens_cpu, *[0] * 14]
    assert inputs["prompt_lens"].tolist() == [*prompts.kv_lens_cpu, 0]
    assert inputs["cu_q_lens"].tolist() == [*prompts.cu_q_lens.tolist(), 77]
    for name, batch in (("decode_table", decodes), ("prompt_table", prompts)):
        count, width = batch.page_table.shape
        assert inputs[name][:count, :width].tolist() == batch.page_table.tolist()
        assert not inputs[name][count:].any()


def test_a_step_that_samples_nothing_has_no_parameters() -> None:
    rows = SamplingRows.of([]).following([sequence(1, 3, 1)]).following([])
    assert rows.parameters(np.zeros(0, np.int64)).shape == (0, 5) and rows.all_plain(np.zeros(0, np.int64))


@pytest.mark.parametrize(
    ("step", "size"),
    [
        ((0, 1, 1, 5), GraphSize(0, 64, 4, 512)),
        ((17, 64, 4, 5), GraphSize(40, 64, 4, 512)),
        ((3, 64, 5, 513), GraphSize(16, 256, 8, 1000)),  # one prompt more than the least takes
        ((3, 257, 1, 600), None),
        ((3, 100, 30, 600), None),
    ],
)
def test_the_least_size_that_takes_a_step_is_its_size(step: tuple[int, int, int, int], size: GraphSize | None) -> None:
    assert LIMITS.size(*step) == size


def test_steps_whose_padding_or_page_tables_cost_more_than_launching_are_launched() -> None:
    limits = GraphLimits(1024, 131072, PAGE_SIZE, 99999, 256, 1000)
    assert limits.size(100, 20, 1, 500) == GraphSize(128, 64, 4, 512)
    assert limits.size(300, 20, 1, 500) is None  # 1024 rows, of which 720 are padding
    assert limits.size(100, 20, 1, 33000) is None  # 132 rows of 8,192 pages
    for size in (limits.size(100, 20, 1, 500), limits.size(0, 256, 8, 8000)):
        assert size is not None and spans(size, PAGE_SIZE)[-1].end <= storage_bytes(limits)


def test_prompts_that_take_the_device_longer_than_the_host_are_launched() -> None:
    small, large = 85_000_000, 7_000_000_000
    assert LIMITS.worth(8192, small).most_tokens == 8192
    assert LIMITS.worth(1000, small).most_tokens == 1024
    assert LIMITS.worth(8192, large).most_tokens == 256


@needs_cuda
@pytest.mark.parametrize("overlap", [False, True])
def test_replayed_prompts_give_the_tokens_of_launched_ones(overlap: bool) -> None:
    """In float32; prompts in chunks, among decodes, of every kind of request, more of them than a graph takes too."""
    settings: dict[str, Any] = {"dtype": "float32", "attention": "triton", "max_num_batched_tokens": 100}
    launched = run(make_engine(cuda_graphs=False, overlap=False, **settings), 60)
    engine = make_engine(cuda_graphs=True, overlap=overlap, **settings)
    assert run(engine, 60) == launched
    executor: Any = engine._executor
    sizes = {size for size in executor._runner._graphs.sizes if size.prompts}
    assert len(sizes) >= 4 and any(not size.decodes for size in sizes)
