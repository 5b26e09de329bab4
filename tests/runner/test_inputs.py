"""Inputs: each token at its position and slot, each phase with its own sequences."""

from __future__ import annotations

import torch

from tessera.attention.contract import Phase
from tessera.runner.inputs import InputBuilder
from tessera.types import SamplingParams, Sequence, Step


def sequence(tokens: list[int], computed: int, pages: list[int]) -> Sequence:
    return Sequence("r", 0, tokens, len(tokens), SamplingParams(), 0, pages=pages, num_computed_tokens=computed)


def test_a_mixed_step_puts_every_token_at_its_position_and_slot() -> None:
    decode = sequence([10, 11, 12, 13, 14], 4, [7, 3])
    chunk = sequence([20, 21, 22, 23, 24, 25, 26], 2, [5, 1])
    inputs = InputBuilder(20, 4, torch.device("cpu")).build(Step({decode: 1, chunk: 3}))
    assert inputs.token_ids.tolist() == [14, 22, 23, 24]
    assert inputs.positions.tolist() == [4, 2, 3, 4]
    assert inputs.slots.tolist() == [3 * 4, 5 * 4 + 2, 5 * 4 + 3, 1 * 4]
    assert inputs.sampling == [decode]  # the chunk does not reach its last token
    assert inputs.sampling_rows.tolist() == [0]
    assert inputs.first_rows == {decode: 0, chunk: 1}
    tokens, batch = inputs.batches[Phase.DECODE]
    assert (tokens, batch.q_lens_cpu, batch.kv_lens_cpu) == (slice(0, 1), [1], [5])
    assert batch.page_table.tolist() == [[7, 3]]
    tokens, batch = inputs.batches[Phase.PREFILL]
    assert (tokens, batch.q_lens_cpu, batch.kv_lens_cpu) == (slice(1, 4), [3], [5])
    assert (batch.cu_q_lens.tolist(), batch.max_q_len, batch.max_kv_len) == ([0, 3], 3, 5)
    assert {batch.num_pages for _, batch in inputs.batches.values()} == {20}


def test_a_phase_without_tokens_has_no_batch() -> None:
    inputs = InputBuilder(20, 4, torch.device("cpu")).build(Step({sequence([1], 0, [0]): 1}))
    assert set(inputs.batches) == {Phase.DECODE}
