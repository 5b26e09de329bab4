from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import DEVICES, PAGED, make_shape
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.attention.reference import reference_attention
from tessera.attention.step import Attention
from tessera.attention.workloads import make_batch

WINDOWS = [None, 8, None, 8]
"""Of each layer; two groups."""
DECODE = ((1, 33), (1, 5))
PREFILL = ((6, 6), (17, 40))
TABLE = torch.tensor([[9, 2, 4], [1, 0, 0], [7, 0, 0], [3, 8, 5]], dtype=torch.int32)
"""Pages of 16 of the four sequences above; 0, 6, 10 and 11 belong to nobody."""


def make_attention(device: str) -> tuple[Attention, list[Shape]]:
    shapes = [make_shape(device=device, window=window) for window in (None, 8)]
    backends: dict[Phase, list[AttentionBackend[Any]]] = {
        Phase.PREFILL: [TorchSdpa(Phase.PREFILL, shape) for shape in shapes],
        Phase.DECODE: [Naive(Phase.DECODE, shape) for shape in shapes],
    }
    return Attention(backends, [0, 1, 0, 1]), shapes


def slots_of(lens: tuple[tuple[int, int], ...], table: Tensor) -> list[int]:
    return [
        int(row[position // 16]) * 16 + position % 16
        for row, (q_len, kv_len) in zip(table, lens)
        for position in range(kv_len - q_len, kv_len)
    ]


def make_step(device: str) -> tuple[dict[Phase, tuple[slice, Batch]], list[int]]:
    batches = {
        Phase.DECODE: (slice(0, 2), make_batch(DECODE, TABLE[:2], 12, device)),
        Phase.PREFILL: (slice(2, 25), make_batch(PREFILL, TABLE[2:], 12, device)),
    }
    return batches, slots_of(DECODE, TABLE[:2]) + slots_of(PREFILL, TABLE[2:])


def make_tensors(tokens: int, device: str) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k_pages, v_pages = (list(torch.randn(4, 12, 16, 2, 32, device=device)) for _ in range(2))
    q = torch.randn(tokens, 6, 32, device=device)
    k, v = torch.randn(2, tokens, 2, 32, device=device)
    return k_pages, v_pages, q, k, v


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_step_equals_the_oracle_in_every_layer(device: str) -> None:
    """Two phases with different backends, two windows: each token gets its own phase's and layer's answer."""
    attention, shapes = make_attention(device)
    batches, slots = make_step(device)
    k_pages, v_pages, q, k, v = make_tensors(25, device)
    attend = attention.begin_step(k_pages, v_pages, torch.tensor(slots, device=device), batches)
    for layer in range(4):
        out = attend(layer, q, k, v)
        for phase, (tokens, batch) in batches.items():
            wanted = reference_attention(phase, shapes[layer % 2], batch, q[tokens], k_pages[layer], v_pages[layer])
            torch.testing.assert_close(out[tokens].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_step_writes_its_slots_of_its_layer_and_leaves_every_other_byte(device: str) -> None:
    attention, _ = make_attention(device)
    batches, slots = make_step(device)
    k_pages, v_pages, q, k, v = make_tensors(25, device)
    wanted = [[pages.clone() for pages in pools] for pools in (k_pages, v_pages)]
    for pools, values in zip(wanted, (k, v)):
        pools[2].flatten(0, 1)[slots] = values
    attention.begin_step(k_pages, v_pages, torch.tensor(slots, device=device), batches)(2, q, k, v)
    for pools, expected in zip((k_pages, v_pages), wanted):
        assert all(torch.equal(pages, other) for pages, other in zip(pools, expected))


@pytest.mark.parametrize("phase", PAGED)
def test_step_of_one_phase_equals_that_phase_of_a_mixed_step(phase: Phase) -> None:
    attention, _ = make_attention("cpu")
    batches, slots = make_step("cpu")
    tokens, batch = batches[phase]
    k_pages, v_pages, q, k, v = make_tensors(25, "cpu")
    mixed = attention.begin_step(k_pages, v_pages, torch.tensor(slots), batches)(1, q, k, v)
    only = {phase: (slice(0, tokens.stop - tokens.start), batch)}
    alone = attention.begin_step(k_pages, v_pages, torch.tensor(slots[tokens]), only)
    assert torch.equal(alone(1, q[tokens], k[tokens], v[tokens]), mixed[tokens])


def test_padding_tokens_write_nothing_and_come_back_as_zeros() -> None:
    """Two tokens that belong to no batch, as in a step padded to a fixed size."""
    attention, _ = make_attention("cpu")
    batches, slots = make_step("cpu")
    k_pages, v_pages, q, k, v = make_tensors(27, "cpu")
    k[25:], v[25:], q[25:] = torch.nan, torch.nan, torch.nan
    unpadded = [pages.clone() for pages in k_pages], [pages.clone() for pages in v_pages]
    out = attention.begin_step(k_pages, v_pages, torch.tensor([*slots, -1, -1]), batches)(0, q, k, v)
    wanted = attention.begin_step(*unpadded, torch.tensor(slots), batches)(0, q[:25], k[:25], v[:25])
    assert torch.equal(out[:25], wanted)
    assert not out[25:].any()
    assert all(torch.equal(*pair) for pair in zip(k_pages + v_pages, unpadded[0] + unpadded[1]))


def test_padding_sequence_in_a_decode_batch_writes_nothing() -> None:
    """kv_len 0 announces the negative slot, without a look at the device."""
    attention, _ = make_attention("cpu")
    table = torch.cat([TABLE[:2], torch.zeros(1, 3, dtype=torch.int32)])
    batches = {Phase.DECODE: (slice(0, 3), make_batch((*DECODE, (1, 0)), table, 12))}
    k_pages, v_pages, q, k, v = make_tensors(3, "cpu")
    before = k_pages[0].clone()
    slots = slots_of(DECODE, TABLE[:2])
    out = attention.begin_step(k_pages, v_pages, torch.tensor([*slots, -1]), batches)(0, q, k, v)
    before.flatten(0, 1)[slots] = k[:2]
    assert torch.equal(k_pages[0], before)
    assert out.isfinite().all()


def test_plans_are_made_before_the_first_layer_and_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[tuple[Phase, int | None]] = []

    def plan(self: Naive | TorchSdpa, _: Batch) -> list[object]:
        planned.append((self.phase, self.shape.window))
        return []

    monkeypatch.setattr(Naive, "plan", plan)
    monkeypatch.setattr(TorchSdpa, "plan", plan)
    attention, _ = make_attention("cpu")
    batches, slots = make_step("cpu")
    k_pages, v_pages, *_ = make_tensors(25, "cpu")
    attention.begin_step(k_pages, v_pages, torch.tensor(slots), batches)
    assert sorted(planned, key=str) == sorted(((phase, window) for phase in PAGED for window in (None, 8)), key=str)
