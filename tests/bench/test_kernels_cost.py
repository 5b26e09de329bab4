"""FLOPs and bytes are those of the pairs that attend, as the oracle's mask counts them."""

from __future__ import annotations

import pytest
import torch

from tessera.attention.contract import Shape
from tessera.attention.reference import visible_keys
from tessera.bench.kernels.cases import Heads
from tessera.bench.kernels.cost import cost, seen_keys, visible_pairs

LENS = [(1, 1), (1, 9), (5, 5), (5, 12), (12, 12), (7, 30), (30, 30)]


@pytest.mark.parametrize("window", [None, 1, 2, 5, 12, 29, 30, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_those_of_the_mask(causal: bool, window: int | None) -> None:
    shape = Shape(4, 2, 8, 1.0, torch.float32, "cpu", window=window, causal=causal)
    for q_len, kv_len in LENS:
        if not causal and q_len != kv_len:
            continue
        mask = visible_keys(shape, q_len, kv_len)
        assert visible_pairs(q_len, kv_len, causal=causal, window=window) == int(mask.sum()), (q_len, kv_len)


@pytest.mark.parametrize("window", [None, 1, 5, 29, 100])
def test_keys_that_no_query_sees_are_not_read(window: int | None) -> None:
    shape = Shape(4, 2, 8, 1.0, torch.float32, "cpu", window=window)
    for q_len, kv_len in LENS:
        assert seen_keys(q_len, kv_len, window=window) == int(visible_keys(shape, q_len, kv_len).any(0).sum())


def test_a_case_costs_what_its_sequences_do() -> None:
    found = cost(((1, 100), (10, 10)), Heads(8, 2, 64), 2, causal=True)
    assert found.flops == 4 * 64 * 8 * (100 + 55)
    assert found.num_bytes == 2 * 64 * (2 * 11 * 8 + 2 * 110 * 2)


@pytest.mark.parametrize(("flops_s", "bytes_s", "bound"), [(1e3, 1e12, "compute"), (1e12, 1e3, "bandwidth")])
def test_the_ceiling_that_is_met_first_bounds(flops_s: float, bytes_s: float, bound: str) -> None:
    found = cost(((8, 8),), Heads(1, 1, 8), 4, causal=True)
    assert found.bound(flops_s, bytes_s) == bound
    amount = found.flops if bound == "compute" else found.num_bytes
    assert found.least_ms(flops_s, bytes_s) == pytest.approx(amount)
