"""The sampling kernel: the sampler's own tokens, exact distributions, and each row for itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.runner.parameters import parameters
from tessera.runner.sampler import Sampler
from tessera.types import SamplingParams, Sequence
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    loads_before_waiting,
    needs_compiler,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.sampling import BLOCK, FINISH_BLOCK, FINISH_WARPS, LOGITS_PER_WARP, PARAMETERS, sample
from tessera.kernels.sampling_finish import draw_kernel
from tessera.kernels.sampling_kernels import list_kernel, peak_kernel, weigh_kernel
from tessera.kernels.sampling_rows import CHUNK

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 400, "top_p": 0.5, "min_p": 0.001},
    {"top_k": 10**9},
    {"top_k": 1},
    {"top_p": 0.999, "temperature": 3.0},
    {"top_p": 1e-40},
]


MORE = 20 if DEVICE == "cuda" else 1
"""Draws for each that the interpreter makes, which takes 5 ms for one, and 60 with a search."""


def make_sequence(seed: int = 0, **params: Any) -> Sequence:
    return Sequence("r", 0, [1, 2, 3], 2, SamplingParams(**params), seed)


def random_logits(rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def draw_evenly(logits: Tensor, count: int, **params: float) -> Tensor:
    """How often each token comes, over draws that lie evenly in [0, 1); logits [vocab]."""
    count *= MORE
    given = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0} | params
    table = torch.tensor([given.get(name, 0.0) for name in PARAMETERS], dtype=torch.float64).repeat(count, 1)
    table[:, PARAMETERS.index("draw")] = (torch.arange(count) * 2**32 // count).double() / 2**32
    tokens = sample(logits.expand(count, -1).to(DEVICE), table.to(DEVICE))
    return torch.bincount(tokens.cpu(), minlength=len(logits)) / MORE


@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@pytest.mark.parametrize("vocab_size", [40, 1000, 2 * BLOCK + 77])
def test_tokens_are_those_of_the_path_by_torch(vocab_size: int) -> None:
    """Rows of every kind mixed, each with its own seed."""
    rows = [make_sequence(seed, **params) for seed in range(2 * MORE) for params in SETTINGS]
    logits = random_logits(len(rows), vocab_size)
    expected = Sampler([0]).sample(logits.clone(), rows).token_ids.tolist()
    fused = Sampler([0], torch.device(DEVICE), fused=True)
    found = fused.sample(logits.to(DEVICE), rows).token_ids.tolist()
    differing = sum(mine != theirs for mine, theirs in zip(found, expected, strict=True))
    assert differing <= len(rows) // 400  # of so many one draw may be on the border of two tokens


@needs_kernels
def test_tokens_come_as_often_as_the_softmax_says() -> None:
    """Chi-square over seeds, against the exact softmax of what min-p leaves."""
    logits, count = random_logits(1, 16) / 2, 300 * MORE
    rows = [make_sequence(seed, temperature=1.3, min_p=0.1) for seed in range(count)]
    probs = (logits[0] / 1.3).softmax(-1)
    kept = (probs >= 0.1 * probs.max()).nonzero()[:, 0]
    assert 9 <= len(kept) <= 12
    expected = probs[kept] / probs[kept].sum() * count
    tokens = sample(logits.expand(count, -1).to(DEVICE), torch.from_numpy(parameters(rows)).to(DEVICE)).cpu()
    found = torch.bincount(tokens, minlength=16)
    assert found[kept].sum() == count
    assert (
        (found[kept] - expected) ** 2 / expected
    ).sum() < 42  # 11 degrees of freedom at most: beyond by chance once in 70,000


@needs_kernels
def test_even_draws_give_each_token_its_exact_share() -> None:
    logits = random_logits(1, 24)[0] / 3
    found = draw_evenly(logits, 100, temperature=0.9)
    assert ((found - (logits / 0.9).softmax(-1) * 100).abs() < 1.01).all()


@needs_kernels
@pytest.mark.parametrize("top_k", [1, 5, 11, 12, 13])
def test_top_k_keeps_exactly_the_k_most_likely(top_k: int) -> None:
    logits = torch.randperm(12, generator=torch.Generator().manual_seed(1)) * 0.01
    found = draw_evenly(logits, 26, top_k=top_k)
    assert set(found.nonzero()[:, 0].tolist()) == set(logits.topk(min(top_k, 12)).indices.tolist())


@needs_kernels
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.97])
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(top_p: float) -> None:
    logits = random_logits(1, 12)[0] / 6
    probs, order = logits.softmax(-1).sort(descending=True)
    kept = order[: int((probs.cumsum(0) - probs < top_p).sum())]
    found = draw_evenly(logits, 30, top_p=top_p)
    assert kept[-1] != order[-1] and set(found.nonzero()[:, 0].tolist()) == set(kept.tolist())


@needs_kernels
def test_min_p_drops_tokens_below_the_share_of_the_best() -> None:
    logits = random_logits(1, 12)[0] / 3
    probs = logits.softmax(-1)
    found = draw_evenly(logits, 60, min_p=0.2)
    assert set(found.nonzero()[:, 0].tolist()) == set((probs >= 0.2 * probs.max()).nonzero()[:, 0].tolist())


@needs_kernels
def test_tokens_equal_to_the_kth_are_all_kept() -> None:
    found = draw_evenly(torch.tensor([0.0, 1.0, 1.0, 2.0, 1.0]), 12, top_k=2)
    assert (found > 0).tolist() == [False, True, True, True, True]


@needs_kernels
@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.1, "min_p": 1.0}])
def test_equal_logits_are_all_kept(params: dict[str, float]) -> None:
    assert (draw_evenly(torch.full((8,), 3.5), 16, **params) == 2).all()


@needs_kernels
@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, 0.0])
def test_equal_logits_are_equally_likely_however_low_or_high(value: float) -> None:
    assert (draw_evenly(torch.full((8,), value), 16) == 2).all()


@needs_kernels
@pytest.mark.timeout(120)
@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 1e-30}], ids=str)
def test_a_search_among_the_smallest_numbers_ends(params: dict[str, float]) -> None:
    least = 2.0**-149
    found = draw_evenly(torch.tensor([0.0, 3 * least, least, 2 * least]), 8, **params)
    assert found.tolist() == ([0, 4, 0, 4] if "top_k" in params else [0, 8, 0, 0])


@needs_kernels
def test_greedy_takes_the_lowest_id_of_equal_logits() -> None:
    logits = torch.zeros(4, 2 * BLOCK + 5)
    logits[0, [7, 300, BLOCK + 7]] = 4.0
    logits[1, [BLOCK + 3, 2 * BLOCK + 1]] = 4.0
    logits[2] = -torch.inf
    logits[3, 5], logits[3, 6] = torch.nan, 1.0
    table = torch.zeros(4, 5, dtype=torch.float64)
    assert sample(logits.to(DEVICE), table.to(DEVICE)).tolist() == [7, BLOCK + 3, 0, 6]


@needs_kernels
@pytest.mark.parametrize("truncated", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logits_without_a_distribution_give_a_token_of_the_vocabulary(truncated: dict[str, float]) -> None:
    for value in (torch.nan, -torch.inf):
        assert draw_evenly(torch.full((6,), value), 3, **truncated)[:6].sum() == 3
    for rare in (torch.nan, -torch.inf):
        assert draw_evenly(torch.tensor([rare, 1.0, rare, -1e30]), 3, **truncated).tolist() == [0, 3, 0, 0]
    assert draw_evenly(torch.tensor([0.0, torch.inf, 9.0]), 3, **truncated).tolist() == [0, 3, 0]


@needs_kernels
def test_the_last_possible_draw_takes_the_last_token_with_weight() -> None:
    table = torch.tensor([[1.0, 0, 1, 0, 1 - 2**-32]], dtype=torch.float64)
    logits = torch.zeros(1, 4000)
    logits[0, 3990:] = -1000.0
    assert sample(logits.to(DEVICE), table.to(DEVICE)).tolist() == [3989]


@needs_kernels
def test_a_draw_on_the_border_of_blocks_passes_over_tokens_without_weight() -> None:
    table = torch.tensor([[1.0, 0, 1, 0, 0.5]], dtype=torch.float64)
    logits = torch.zeros(1, 3 * BLOCK)
    logits[0, BLOCK : 2 * BLOCK] = -1000.0
    assert sample(logits.to(DEVICE), table.to(DEVICE)).tolist() == [2 * BLOCK]


@needs_kernels
def test_a_row_has_the_same_token_in_any_batch() -> None:
    rows = [make_sequence(9, **params) for params in SETTINGS]
    logits = random_logits(len(rows), 500).to(DEVICE)
    table = torch.from_numpy(parameters(rows)).to(DEVICE)
    alone = [int(sample(logits[i : i + 1], table[i : i + 1])) for i in range(len(rows))]
    assert sample(logits, table).tolist() == alone
    assert sample(logits[:0], table[:0]).shape == (0,)


POINTERS = {
    "logits": "*fp32", "parameters": "*fp64", "out": "*i64", "peaks": "*fp32", "best": "*i32", "weights": "*fp32",
    "bounds": "*fp32", "totals": "*i64", "counts": "*i32", "masses": "*i64", "marks": "*i64", "sums": "*i64",
    "values": "*fp32", "ids": "*i32",
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kernel", [peak_kernel, weigh_kernel, list_kernel, draw_kernel], ids=lambda k: k.__name__)
def test_it_compiles_for_hopper_with_wide_loads(kernel: Any) -> None:
    last = kernel is draw_kernel
    constants: dict[str, Any] = {"BLOCK": FINISH_BLOCK, "SUMS": 2048} if last else {"CHUNKS": BLOCK // int(CHUNK)}
    num_warps = FINISH_WARPS if last else BLOCK // LOGITS_PER_WARP
    ptx = compile_for_hopper(kernel, POINTERS, constants | {"PDL": True}, num_warps)
    assert "ld.global.v4.b32" in ptx if last else re.search(r"cp\.async\.cg\S* \[.*\], \[.*\], 0x10", ptx)
    assert loads_before_waiting(ptx) == 0


@needs_compiler
def test_what_was_added_to_sums_is_read_past_the_first_cache() -> None:
    """The interpreter, which has no threads and no caches, would not notice."""
    ptx = compile_for_hopper(draw_kernel, POINTERS, {"BLOCK": 2048, "SUMS": 2048, "PDL": True}, FINISH_WARPS)
    added = max(ptx.rfind("red.global"), ptx.rfind("atom.global"))  # as the compiler likes; nobody reads what was there
    assert "bar.sync" in ptx[added:] and "ld.global.cg" in ptx[ptx.index("bar.sync", added) :]


@needs_cuda
def test_a_large_vocabulary_gives_the_tokens_of_the_path_by_torch() -> None:
    rows = [make_sequence(seed, **params) for seed in range(5) for params in SETTINGS]
    logits = random_logits(len(rows), 151_936)
    expected = Sampler([0]).sample(logits.clone(), rows).token_ids.tolist()
    found = Sampler([0], torch.device(DEVICE), fused=True).sample(logits.to(DEVICE), rows).token_ids.tolist()
    differing = sum(mine != theirs for mine, theirs in zip(found, expected))
    assert differing <= 2  # of 60: a draw on the border of two tokens may fall to either


@needs_cuda
def test_a_graph_replays_with_other_logits_and_parameters() -> None:
    device = torch.device(DEVICE)
    logits = random_logits(len(SETTINGS), 50_000).to(device)
    table = torch.from_numpy(parameters([make_sequence(1, **params) for params in SETTINGS])).to(device)
    sample(logits, table)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(logits, table)
    logits.copy_(random_logits(len(SETTINGS), 50_000, seed=5))
    table.copy_(torch.from_numpy(parameters([make_sequence(2, **params) for params in reversed(SETTINGS)])))
    graph.replay()
    assert torch.equal(out, sample(logits, table))
