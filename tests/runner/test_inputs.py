"""Inputs: each token at its position and slot, each phase with its own sequences."""

from __future__ import annotations

from random import Random

import numpy as np
import torch

from tessera.attention.contract import Phase
from tessera.runner.inputs import InputBuilder, LastSampled
from tessera.runner.page_table import PageTable
from tessera.runner.parameters import SamplingRows, parameters
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.step import Step, StepResult
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


def test_pending_and_known_tokens_of_decodes_and_prompts_stand_in_one_step() -> None:
    pending, known = sequence([1, 2], 2, [0]), sequence([5, 6], 1, [1])
    recomputed, chunk = sequence([10, 11, 12], 1, [2]), sequence([20, 21, 22, 23, 24], 1, [3])
    last = LastSampled([known, pending], torch.tensor([8, 9]))
    step = Step.of({pending: 1, known: 1, recomputed: 2, chunk: 3})
    host = InputBuilder(40, 4, torch.device("cpu")).build_on_host(step, last)
    assert host.token_ids.tolist() == [0, 6, 11, 12, 21, 22, 23]
    assert host.sources.tolist() == [1, -1, -1, -1, -1, -1, -1]
    assert host.samples.tolist() == [True, True, True, False]


class Checked:
    """An executor that compares what is kept from step to step with what is made of each sequence alone."""

    def __init__(self, random: Random, num_pages: int, page_size: int) -> None:
        self.random, self.page_size = random, page_size
        self.builder = InputBuilder(num_pages, page_size, torch.device("cpu"))
        self.rows = SamplingRows.of([])
        self.last: LastSampled | None = None
        self.same = 0

    def begin(self, step: Step) -> Checked:
        """Check a step's inputs; tokens are sampled at random."""
        host = self.builder.build_on_host(step, self.last)
        self.same += self.last is not None and self.last.sequences is step.sequences
        first = 0
        for row, (each, count) in enumerate(step.num_tokens.items()):
            end = each.num_computed_tokens + count
            for token in range(end - count, end):
                page = each.pages[token // self.page_size]
                assert host.table[row, token // self.page_size] == page
                assert host.slots[first] == page * self.page_size + token % self.page_size
                assert host.positions[first] == token
                if token < len(each.token_ids):
                    assert (host.token_ids[first], host.sources[first]) == (each.token_ids[token], -1)
                else:
                    assert self.last is not None and self.last.sequences[host.sources[first]] is each
                first += 1
            assert host.kv_lens[row] == end and host.q_lens[row] == count
        assert first == len(host.token_ids)
        self.rows = self.rows.following(step.sampling)
        num_tokens = step.kv_lens[step.samples]
        assert self.rows.parameters(num_tokens).tolist() == parameters(step.sampling).tolist()
        assert num_tokens.tolist() == [each.num_tokens for each in step.sampling]
        self.sampled = [self.random.randrange(9) for _ in step.sampling]
        self.last = LastSampled(step.sampling, torch.tensor(self.sampled))
        return self

    def result(self) -> StepResult:
        """What was sampled."""
        return StepResult(self.sampled)


def test_inputs_kept_from_step_to_step_are_those_made_anew_whatever_is_scheduled() -> None:
    same = 0
    for seed in range(30):
        random = Random(seed)
        page_size, num_pages = random.choice((1, 4, 16)), random.choice((64, 90, 300))
        executor = Checked(random, num_pages, page_size)
        limits = SchedulerLimits(random.choice((2, 8)), random.choice((8, 40)), 64, page_size)
        scheduler = Scheduler(limits, PagePool(num_pages), {8})
        while scheduler.num_running + scheduler.num_waiting or random.random() < 0.8:
            if random.random() < 0.2:
                params = SamplingParams(max_tokens=random.randrange(1, 40), temperature=random.choice((0.0, 1.0)))
                tokens = [random.randrange(9) for _ in range(random.randrange(1, 24))]
                scheduler.add(Sequence(str(random.random()), 0, tokens, len(tokens), params, random.randrange(99)))
            step = scheduler.schedule()
            if step.sequences:
                sampled = executor.begin(step).result()
                scheduler.begin(step)
                if random.random() < 0.5 and not scheduler.needs_results:  # one more, while the result is out
                    ahead = scheduler.schedule()
                    if ahead.sequences:
                        more = executor.begin(ahead).result()
                        scheduler.begin(ahead)
                        scheduler.commit(step, sampled)
                        step, sampled = ahead, more
                scheduler.commit(step, sampled)
        same += executor.same
    assert same > 100, "steps of the same decodes have the very same list of them"
