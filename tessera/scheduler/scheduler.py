"""The scheduler: waiting and running sequences, and what the next step computes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator
from dataclasses import dataclass

from tessera.scheduler.pages import PagePool
from tessera.scheduler.prefix import find_prefix, remember_pages
from tessera.types import FinishReason, Output, Sequence, Step, StepResult


@dataclass(frozen=True)
class SchedulerLimits:
    """What no step may exceed."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    prefix_caching: bool = True


@dataclass
class SchedulerCounters:
    """What has happened since the start."""

    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


class Scheduler:
    """Decides which tokens the next step computes.

    Host code only: no tensors, no clock, no device. State changes in `add`, `abort`, `schedule`, `begin` and
    `commit` and nowhere else: a page that `schedule` reserves, `commit` keeps or gives back. Between `begin` and
    `commit` of a step one more may be scheduled and begun: what the first samples is pending until then, a sequence
    that it finishes is in the second for nothing, and its pages may be given to others at once, since a device
    computes steps in the order in which they begin.
    Sequences run in order of arrival. Where pages run out the youngest gives all of its own back and
    is computed again later (preemption by recomputation), so the oldest always goes on; one sequence of
    `max_model_len` must fit into the pool.
    """

    def __init__(self, limits: SchedulerLimits, pool: PagePool, eos_token_ids: Container[int]) -> None:
        if pool.num_pages * limits.page_size < limits.max_model_len:
            raise ValueError(f"{pool.num_pages} pages cannot hold one sequence of {limits.max_model_len} tokens")
        self.limits, self.pool, self.counters = limits, pool, SchedulerCounters()
        self._eos_token_ids = eos_token_ids
        # A running sequence always gets its decode token, so no more may run than tokens fit a step.
        self._max_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._demanding: set[Sequence] = set()
        """Of all sequences those that may need results: few, while a step looks at them every time."""

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no pages yet, or no more."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind all others; its prompt has to fit `max_model_len` (the engine checks)."""
        self._waiting.append(sequence)
        if sequence.needs_results:
            self._demanding.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Forget the request's sequences (or only number `index`) and free their pages; says if there were any."""
        found = False
        for queue in (self._running, self._waiting):
            for sequence in [s for s in queue if s.request_id == request_id and index in (None, s.index)]:
                queue.remove(sequence)
                self._finish(sequence)
                found = True
        return found

    def schedule(self) -> Step:
        """The next step: every running decode, then chunks of prompts while the budget lasts.

        Reserves the pages the step writes. An empty step means that nothing is left to do.
        """
        plan: dict[Sequence, int] = {}
        preempted = self._schedule_running(plan)
        if not preempted:
            self._admit(plan)
        decodes = {s: n for s, n in plan.items() if n == 1}
        return Step(decodes | plan)

    def begin(self, step: Step) -> None:
        """Take note that the device has been given a step: its tokens count as computed, what it samples as pending."""
        for sequence, num_tokens in step.num_tokens.items():
            sequence.num_computed_tokens += num_tokens
        for sequence in step.sampling:
            sequence.num_pending += 1

    def commit(self, step: Step, result: StepResult) -> list[Output]:
        """Take in what a step that has begun found: new tokens, finished sequences, pages that others may share."""
        outputs: list[Output] = []
        for sequence, num_tokens in step.num_tokens.items():
            if sequence.finished:
                continue
            sequence.prompt_logprobs += result.prompt_logprobs.get(sequence, [])
            if self.limits.prefix_caching and sequence.pages:  # a sequence preempted since holds none
                start = step.starts[sequence]
                remember_pages(sequence, start, start + num_tokens, self.pool, self.limits.page_size)
            if sequence in result.token_ids:
                outputs.append(self._append(sequence, result))
        return outputs

    @property
    def needs_results(self) -> bool:
        """Whether the next step should not be prepared while results are out.

        Because some running sequence's cannot be, or because pages may run out, and a result may free some before a
        sequence has to give up its own.
        """
        most_pages = len(self._running) + self._num_pages(self.limits.max_num_batched_tokens)
        if self.pool.num_available < most_pages and any(sequence.num_pending for sequence in self._running):
            return True
        return any(sequence.needs_results and sequence.pages for sequence in self._demanding)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is running or waiting."""
        yield from self._running
        yield from self._waiting

    def check(self) -> None:
        """Raise AssertionError where pages and sequences contradict one another (for tests and idle time)."""
        self.pool.check(sequence.pages for sequence in self.sequences())
        assert all(not s.pages and s.num_computed_tokens == 0 for s in self._waiting)
        assert len(self._running) <= self._max_running

    def _schedule_running(self, plan: dict[Sequence, int]) -> bool:
        """Plan the running sequences, decodes before prompt chunks; says whether any had to be preempted."""
        budget, preempted = self.limits.max_num_batched_tokens, set[Sequence]()
        remaining = {
            s: len(s.token_ids) + s.num_pending - s.num_computed_tokens
            for s in self._running
            if not (s.num_pending and self._is_full(s))
        }
        prompts = [sequence for sequence, count in remaining.items() if count > 1]
        for sequence in [*(s for s, count in remaining.items() if count == 1), *prompts]:
            if sequence in preempted:
                continue  # for an older one
            num_tokens = min(remaining[sequence], budget)
            if num_tokens == 0:
                continue
            while (victim := self._reserve_or_victim(sequence, num_tokens)) is not None:
                preempted.add(victim)
                budget += plan.pop(victim, 0)
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                plan[sequence] = num_tokens
                budget -= num_tokens
        return bool(preempted)

    def _is_full(self, sequence: Sequence) -> bool:
        """Whether the pending token of a sequence is the last that it may have, whatever it turns out to be."""
        most = sequence.params.max_tokens
        full = most is not None and sequence.num_output_tokens >= max(most, 1)
        return full or sequence.num_tokens >= self.limits.max_model_len

    def _reserve_or_victim(self, sequence: Sequence, num_tokens: int) -> Sequence | None:
        """Give `sequence` pages for its next tokens; where there are too few, who has to go first."""
        missing = self._num_pages(sequence.num_computed_tokens + num_tokens) - len(sequence.pages)
        if missing <= 0:
            return None
        if missing > self.pool.num_available:
            return self._running[-1]
        sequence.pages += self.pool.take(missing)
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        if sequence.wants_prompt_logprobs:
            del sequence.prompt_logprobs[1:]
        self._waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def _admit(self, plan: dict[Sequence, int]) -> None:
        """Start waiting sequences, in order, while budget, places and pages last."""
        budget = self.limits.max_num_batched_tokens - sum(plan.values())
        while self._waiting and budget > 0 and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            found = find_prefix(sequence, self.pool, self.limits.page_size) if self.limits.prefix_caching else []
            # All known tokens must fit now, not only this chunk: half a prompt that waits for pages would
            # hold memory that others could finish with. One page a running sequence is kept back, or the
            # newcomer would be preempted as soon as a decode crosses into its next page.
            missing = self._num_pages(len(sequence.token_ids)) - len(found) + len(self._running)
            if missing > self.pool.num_available - sum(not self.pool.is_held(page) for page in found):
                break
            self._waiting.popleft()
            self._start(sequence, found)
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            self._reserve_or_victim(sequence, num_tokens)
            self._running.append(sequence)
            plan[sequence] = num_tokens
            budget -= num_tokens

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self.pool.hold(found)
        sequence.pages = list(found)
        sequence.num_computed_tokens = len(found) * self.limits.page_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.cached_prompt_tokens += sequence.num_cached_tokens
            self.counters.prompt_tokens += sequence.num_prompt_tokens

    def _append(self, sequence: Sequence, result: StepResult) -> Output:
        """Add the sampled token, or find that none was wanted, and say what became of the sequence."""
        wanted = sequence.params.max_tokens != 0
        token_id = result.token_ids[sequence]
        first = len(sequence.token_ids) == sequence.num_prompt_tokens
        sequence.num_pending -= 1
        if wanted:
            sequence.token_ids.append(token_id)
            self.counters.generated_tokens += 1
        reason = self._finish_reason(sequence)
        if reason is not None:
            (self._running if sequence.pages else self._waiting).remove(sequence)
            self._finish(sequence)
        return Output(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=[token_id] if wanted else [],
            logprobs=[result.logprobs[sequence]] if wanted and sequence.params.logprobs is not None else None,
            prompt_logprobs=sequence.prompt_logprobs if first and sequence.prompt_logprobs else None,
            finish_reason=reason,
            stop_token_id=token_id if reason == "stop" else None,
            num_cached_tokens=sequence.num_cached_tokens,
        )

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        params, num_output = sequence.params, len(sequence.token_ids) - sequence.num_prompt_tokens
        if num_output >= max(params.min_tokens, 1):
            last = sequence.token_ids[-1]
            if last in params.stop_token_ids or (last in self._eos_token_ids and not params.ignore_eos):
                return "stop"
        if num_output == params.max_tokens or len(sequence.token_ids) >= self.limits.max_model_len:
            return "length"
        return None

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        self._demanding.discard(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)
