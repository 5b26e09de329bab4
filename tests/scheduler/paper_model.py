"""A model on paper: KV memory is a table of tokens, the next token a function of all before it."""

from __future__ import annotations

from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.types import Output, SamplingParams, Sequence, Step, StepResult

EOS = 0
VOCAB_SIZE = 50


def next_token(tokens: list[int]) -> int:
    """The token that follows `tokens`."""
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 2654435761 >> 7) % VOCAB_SIZE


def continuation(prompt: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """What an engine without batching, paging or caching would generate."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) != params.max_tokens and len(tokens) < max_model_len:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


class PaperRunner:
    """Writes each computed token into its page and reads the whole sequence back from the pages."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * (num_pages * page_size)
        self.page_size = page_size

    def run(self, step: Step) -> StepResult:
        """Compute a step; AssertionError where a sequence's pages do not hold its own tokens."""
        sampled: dict[Sequence, int] = {}
        for sequence, num_tokens in step.num_tokens.items():
            start = sequence.num_computed_tokens
            for position in range(start, start + num_tokens):
                self.slots[self._slot(sequence, position)] = (position, sequence.token_ids[position])
        for sequence, num_tokens in step.num_tokens.items():
            end = sequence.num_computed_tokens + num_tokens
            held = [self.slots[self._slot(sequence, position)] for position in range(end)]
            assert held == list(enumerate(sequence.token_ids[:end])), "the pages hold another sequence's tokens"
            if step.samples(sequence):
                sampled[sequence] = next_token(sequence.token_ids)
        return StepResult(sampled)

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size


class PaperEngine:
    """Scheduler and paper runner, checked after every step."""

    def __init__(self, num_pages: int, limits: SchedulerLimits) -> None:
        self.scheduler = Scheduler(limits, PagePool(num_pages), {EOS})
        self.runner = PaperRunner(num_pages, limits.page_size)
        self.limits = limits
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], str] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        """Queue one sequence."""
        self.tokens[name, 0] = []
        self.scheduler.add(Sequence(name, 0, list(prompt), len(prompt), params, seed=0))

    def step(self) -> Step:
        """One step, with every invariant checked."""
        step = self.scheduler.schedule()
        self.scheduler.check()
        self._check_step(step)
        for output in self.scheduler.commit(step, self.runner.run(step)) if step.num_tokens else []:
            self._take(output)
        self.scheduler.check()
        return step

    def run(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left; the number of steps."""
        for count in range(max_steps):
            if not self.step().num_tokens:
                return count
        raise AssertionError(f"not finished after {max_steps} steps")

    def _take(self, output: Output) -> None:
        key = output.request_id, output.index
        assert key not in self.finished, "output after the end"
        self.tokens[key] += output.token_ids
        if output.finish_reason:
            self.finished[key] = output.finish_reason

    def _check_step(self, step: Step) -> None:
        counts = list(step.num_tokens.values())
        assert sum(counts) <= self.limits.max_num_batched_tokens, "over the token budget"
        assert len(counts) <= self.limits.max_num_seqs
        assert all(count > 0 for count in counts)
        assert counts == sorted(counts, key=lambda count: count > 1), "decodes come first"
        for sequence, count in step.num_tokens.items():
            end = sequence.num_computed_tokens + count
            assert end <= len(sequence.token_ids)
            assert len(sequence.pages) == -(-end // self.limits.page_size), "pages for exactly the computed tokens"
