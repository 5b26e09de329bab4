"""Inputs: each token at its position and slot, each phase with its own sequences."""

from __future__ import annotations

from random import Random

import numpy as np
import torch

from tessera.attention.contract import Phase
from tessera.runner.inputs import InputBuilder, LastSampled
from tessera.runner.page_table import PageTable
from tessera.step import Step
from tessera.types import SamplingParams, Sequence


def sequence(tokens: list[int], computed: int, pages: list[int]) -> Sequence:
    params = SamplingParams(prompt_logprobs=0)
    return Sequence("r", 0, tokens, len(tokens), params, 0, pages=pages, num_computed_tokens=computed)


def test_a_mixed_step_puts_every_token_at_its_position_and_slot() -> None:
    decode = sequence([10, 11, 12, 13, 14], 4, [7, 3])
    chunk = sequence([20, 21, 22, 23, 24, 25, 26], 2, [5, 1])
    inputs = InputBuilder(20, 4, torch.device("cpu")).build(Step.of({decode: 1, chunk: 3}))
    assert inputs.token_ids.tolist() == [14, 22, 23, 24]
    assert inputs.positions.tolist() == [4, 2, 3, 4]
    assert inputs.slots.tolist() == [3 * 4, 5 * 4 + 2, 5 * 4 + 3, 1 * 4]
    assert inputs.sampling == [decode]  # the chunk does not reach its last token
    assert inputs.sampling_rows.tolist() == [0]
    assert inputs.first_rows == {decode: 0, chunk: 1}, "of those that want logprobs of their prompts"
    tokens, batch = inputs.batches[Phase.DECODE]
    assert (tokens, batch.q_lens_cpu, batch.kv_lens_cpu) == (slice(0, 1), [1], [5])
    assert batch.page_table.tolist() == [[7, 3]]
    tokens, batch = inputs.batches[Phase.PREFILL]
    assert (tokens, batch.q_lens_cpu, batch.kv_lens_cpu) == (slice(1, 4), [3], [5])
    assert (batch.cu_q_lens.tolist(), batch.max_q_len, batch.max_kv_len) == ([0, 3], 3, 5)
    assert {batch.num_pages for _, batch in inputs.batches.values()} == {20}


def test_a_phase_without_tokens_has_no_batch() -> None:
    inputs = InputBuilder(20, 4, torch.device("cpu")).build(Step.of({sequence([1], 0, [0]): 1}))
    assert set(inputs.batches) == {Phase.DECODE}


def test_a_pending_token_is_that_of_the_step_before_on_the_device() -> None:
    first, second, third = (sequence([token, token + 1], 1, [token]) for token in (10, 20, 30))
    step = Step.of({first: 1, second: 1, third: 1})
    last = LastSampled(step.sampling, torch.tensor([5, 6, 7]))
    builder = InputBuilder(40, 4, torch.device("cpu"))
    builder.build(step)
    for each in step.sequences:
        each.num_computed_tokens += 1
    second.token_ids.append(9)  # its result is in
    inputs = builder.build(Step.of({third: 1, second: 1, first: 1}), last)
    assert inputs.token_ids.tolist() == [7, 9, 5]
    assert inputs.positions.tolist() == [2, 2, 2]
    assert inputs.sampling == [third, second, first]


def test_the_page_table_follows_whatever_becomes_of_sequences_between_steps() -> None:
    """Random steps: sequences come, go, grow, change places, and come again with other pages."""
    random, table, alive = Random(0), PageTable(), list[Sequence]()
    for number in range(300):
        alive = [each for each in alive if random.random() < 0.9]
        alive += [sequence([0], 0, [random.randrange(99)]) for _ in range(random.randrange(3))]
        for each in alive:
            if random.random() < 0.1:
                each.pages = each.pages[::-1]  # as long, another list: it was preempted
            each.pages += [random.randrange(99) for _ in range(random.choice((0, 0, 0, 1, 7)))]
        random.shuffle(alive) if number % 5 == 0 else None
        if alive:
            found = table.of(alive, np.array([len(each.pages) for each in alive]))
            assert [row[: len(each.pages)].tolist() for row, each in zip(found, alive)] == [s.pages for s in alive]
            assert all(not row[len(each.pages) :].any() for row, each in zip(found, alive))
