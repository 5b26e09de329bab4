"""A model on paper: KV memory is a table of tokens, the next token a function of all before it."""

from __future__ import annotations

from tessera.engine.engine import Engine
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.step import Step, StepResult
from tessera.types import EngineInfo, Output, SamplingParams, Sequence

EOS = 0
VOCAB_SIZE = 50
INFO = EngineInfo("paper", "Paper", "float32", "paper", VOCAB_SIZE, 64, [EOS], 4, 64, 8, 32, [])
"""Of no interest here."""


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


class Computed:
    """A step of the paper runner, which computes it when it begins."""

    def __init__(self, sampled: list[int]) -> None:
        self.sampled = sampled

    def result(self) -> StepResult:
        """What was sampled."""
        return StepResult(self.sampled)


class PaperRunner:
    """Writes each computed token into its page and reads the whole sequence back from the pages.

    A pending token is that of the step before, as on a device.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.slots: list[tuple[int, int] | None] = [None] * (num_pages * page_size)
        self.page_size = page_size
        self.last: dict[Sequence, int] = {}

    def begin(self, step: Step) -> Computed:
        """Compute a step; AssertionError where a sequence's pages do not hold its own tokens."""
        tokens = {s: s.token_ids + ([self.last[s]] if s.num_pending else []) for s in step.sequences}
        for sequence, num_tokens in step.num_tokens.items():
            start = sequence.num_computed_tokens
            for position in range(start, start + num_tokens):
                self.slots[self._slot(sequence, position)] = (position, tokens[sequence][position])
        for sequence, num_tokens in step.num_tokens.items():
            end = sequence.num_computed_tokens + num_tokens
            held = [self.slots[self._slot(sequence, position)] for position in range(end)]
            assert held == list(enumerate(tokens[sequence][:end])), "the pages hold another sequence's tokens"
        self.last = {sequence: next_token(tokens[sequence]) for sequence in step.sampling}
        return Computed(list(self.last.values()))

    def _slot(self, sequence: Sequence, position: int) -> int:
        return sequence.pages[position // self.page_size] * self.page_size + position % self.page_size


class PaperEngine:
    """The engine on a paper runner, checked before and after every step."""

    def __init__(self, num_pages: int, limits: SchedulerLimits, *, overlap: bool = False) -> None:
        self.scheduler = Scheduler(limits, PagePool(num_pages), {EOS})
        self.runner = PaperRunner(num_pages, limits.page_size)
        self.engine = Engine(self, self.scheduler, INFO, overlap=overlap)
        self.limits = limits
        self.steps: list[Step] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finished: dict[tuple[str, int], str] = {}

    def add(self, name: str, prompt: list[int], params: SamplingParams) -> None:
        """Queue one sequence."""
        self.tokens[name, 0] = []
        self.scheduler.add(Sequence(name, 0, list(prompt), len(prompt), params, seed=0))

    def begin(self, step: Step) -> Computed:
        """Check a step that was scheduled, and compute it."""
        self.scheduler.check()
        self._check_step(step)
        self.steps.append(step)
        return self.runner.begin(step)

    def step(self) -> Step:
        """One step, with every invariant checked; an empty one where nothing was computed."""
        before = len(self.steps)
        for output in self.engine.step():
            self._take(output)
        self.scheduler.check()
        return self.steps[-1] if len(self.steps) > before else Step.of({})

    def run(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left; the number of steps."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return len(self.steps)
            self.step()
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
            assert end <= sequence.num_tokens <= self.limits.max_model_len
            assert len(sequence.pages) == -(-end // self.limits.page_size), "pages for exactly the computed tokens"
