"""The scheduler: waiting and running sequences, and what the next step computes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from tessera.scheduler.decodes import Decodes
from tessera.scheduler.ends import append, set_ends
from tessera.scheduler.pages import PagePool
from tessera.scheduler.prefix import PrefixCache
from tessera.step import Step, StepResult
from tessera.types import Output, Sequence


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
    A running sequence is a prompt until a token of it is sampled, then one of the decodes, of which a step looks only
    at those that need a page or may end.
    """

    def __init__(self, limits: SchedulerLimits, pool: PagePool, eos_token_ids: Iterable[int]) -> None:
        if pool.num_pages * limits.page_size < limits.max_model_len:
            raise ValueError(f"{pool.num_pages} pages cannot hold one sequence of {limits.max_model_len} tokens")
        self.limits, self.pool, self.counters = limits, pool, SchedulerCounters()
        self._prefixes = PrefixCache(pool, limits.page_size, enabled=limits.prefix_caching)
        self._eos_token_ids = frozenset(eos_token_ids)
        # A running sequence always gets its decode token, so no more may run than tokens fit a step.
        self._max_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._prompts: list[Sequence] = []
        self._decodes = Decodes()
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
        set_ends(sequence, self.limits.max_model_len, self._eos_token_ids)
        self._waiting.append(sequence)
        if sequence.needs_results:
            self._demanding.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> bool:
        """Forget the request's sequences (or only number `index`) and free their pages; says if there were any."""
        sequences = [s for s in self.sequences() if s.request_id == request_id and index in (None, s.index)]
        self._finish(sequences)
        return bool(sequences)

    def schedule(self) -> Step:
        """The next step: every running decode, then chunks of prompts while the budget lasts.

        Reserves the pages the step writes. An empty step means that nothing is left to do.
        """
        preemptions, chunks = self.counters.preemptions, dict[Sequence, int]()
        self._schedule_decodes(chunks)
        self._schedule_prompts(chunks)
        if self.counters.preemptions == preemptions:
            self._admit(chunks)
        step = self._decodes.step()
        if not chunks:
            return step
        return step.followed_by(Step.of(dict(sorted(chunks.items(), key=lambda item: item[1] > 1))))

    def begin(self, step: Step) -> None:
        """Take note that the device has been given a step: its tokens count as computed, what it samples as pending.

        The step is the one scheduled last, and nothing has happened since.
        """
        for sequence, num_tokens in zip(step.sequences, step.q_lens.tolist()):
            sequence.num_computed_tokens += num_tokens
        self._decodes.move_on()
        done = set(step.sampling[len(self._decodes.sequences) :])
        if done:
            self._decodes.join([sequence for sequence in self._prompts if sequence in done])
            self._prompts = [sequence for sequence in self._prompts if sequence not in done]

    def commit(self, step: Step, result: StepResult) -> list[Output]:
        """Take in what a step that has begun found: new tokens, finished sequences, pages that others may share."""
        for sequence, logprobs in result.prompt_logprobs.items():
            if not sequence.finished:
                sequence.prompt_logprobs += logprobs
        self._prefixes.remember(step)
        outputs: list[Output] = []
        ended: list[Sequence] = []
        for sequence, token_id in zip(step.sampling, result.token_ids):
            if sequence.finished:
                continue
            known = sequence.token_ids
            if sequence.asks_more or token_id in sequence.stop_token_ids or len(known) + 1 >= sequence.most_tokens:
                output = append(sequence, token_id, result.logprobs.get(sequence))
                if output.finish_reason is not None:
                    ended.append(sequence)
            else:
                known.append(token_id)
                output = Output(
                    sequence.request_id, sequence.index, [token_id], None, None, None, None, sequence.num_cached_tokens
                )
            outputs.append(output)
        self.counters.generated_tokens += len(outputs) - sum(sequence.params.max_tokens == 0 for sequence in ended)
        self._finish(ended)
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
        return bool(self._demanding) and any(each.needs_results and each.pages for each in self._demanding)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is running or waiting."""
        yield from self._running
        yield from self._waiting

    def check(self) -> None:
        """Raise AssertionError where pages and sequences contradict one another (for tests and idle time)."""
        self.pool.check(sequence.pages for sequence in self.sequences())
        assert all(not s.pages and s.num_computed_tokens == 0 for s in self._waiting)
        assert len(self._running) <= self._max_running
        parts = dict.fromkeys([*self._decodes.sequences, *self._prompts])
        assert parts.keys() <= set(self._running), "decodes and prompts run"
        assert self._prompts == [s for s in self._running if s in set(self._prompts)], "prompts in order of arrival"
        self._decodes.check()

    def _schedule_decodes(self, chunks: dict[Sequence, int]) -> None:
        """Reserve the pages that decodes begin; leaves out those whose pending token is their last."""
        self._decodes.remove_full()
        sequences = self._decodes.at_page_end(self.limits.page_size)
        if not sequences:
            return
        if len(sequences) <= self.pool.num_available:
            for sequence, page in zip(sequences, self.pool.take(len(sequences))):
                sequence.pages.append(page)
            return
        at_end = set(sequences)
        for sequence in [each for each in self._running if each in at_end]:  # the oldest first
            if sequence.pages:  # or it was preempted for an older one
                self._reserve(sequence, 1, chunks)

    def _schedule_prompts(self, chunks: dict[Sequence, int]) -> None:
        """Plan chunks of running prompts, those of one token first."""
        if not self._prompts:
            return
        remaining = {s: len(s.token_ids) - s.num_computed_tokens for s in self._prompts}
        for sequence in sorted(self._prompts, key=lambda each: remaining[each] > 1):
            num_tokens = min(remaining[sequence], self._budget(chunks))
            if num_tokens and sequence.pages and self._reserve(sequence, num_tokens, chunks):
                chunks[sequence] = num_tokens

    def _budget(self, chunks: dict[Sequence, int]) -> int:
        """Tokens that may join the decodes and these chunks in a step."""
        return self.limits.max_num_batched_tokens - len(self._decodes.sequences) - sum(chunks.values())

    def _reserve(self, sequence: Sequence, num_tokens: int, chunks: dict[Sequence, int]) -> bool:
        """Give a running sequence pages for its next tokens, or say that it had to give up its own.

        Where there are too few, the youngest goes first, out of `chunks` too.
        """
        missing = self._num_pages(sequence.num_computed_tokens + num_tokens) - len(sequence.pages)
        while missing > self.pool.num_available:
            victim = self._running[-1]
            self._preempt(victim)
            chunks.pop(victim, None)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.pages += self.pool.take(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running([sequence])
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        if sequence.wants_prompt_logprobs:
            del sequence.prompt_logprobs[1:]
        self._waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def _admit(self, chunks: dict[Sequence, int]) -> None:
        """Start waiting sequences, in order, while budget, places and pages last."""
        if not self._waiting:
            return
        budget = self._budget(chunks)
        while self._waiting and budget > 0 and len(self._running) < self._max_running:
            sequence = self._waiting[0]
            found = self._prefixes.find(sequence)
            # All known tokens must fit now, not only this chunk: half a prompt that waits for pages would
            # hold memory that others could finish with. One page a running sequence is kept back, or the
            # newcomer would be preempted as soon as a decode crosses into its next page.
            missing = self._num_pages(len(sequence.token_ids)) - len(found) + len(self._running)
            if missing > self.pool.num_available - sum(not self.pool.is_held(page) for page in found):
                break
            self._waiting.popleft()
            self._start(sequence, found)
            num_tokens = min(len(sequence.token_ids) - sequence.num_computed_tokens, budget)
            self._reserve(sequence, num_tokens, chunks)
            self._running.append(sequence)
            self._prompts.append(sequence)
            chunks[sequence] = num_tokens
            budget -= num_tokens

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self.pool.hold(found)
        sequence.pages = list(found)
        sequence.num_computed_tokens = len(found) * self.limits.page_size
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.counters.cached_prompt_tokens += sequence.num_cached_tokens
            self.counters.prompt_tokens += sequence.num_prompt_tokens

    def _finish(self, sequences: Collection[Sequence]) -> None:
        """Forget sequences and free their pages."""
        if not sequences:
            return
        self._stop_running(sequences)
        for sequence in sequences:
            if not sequence.pages:
                self._waiting.remove(sequence)
            sequence.finished = True
            self._demanding.discard(sequence)
            self._release(sequence)

    def _stop_running(self, sequences: Collection[Sequence]) -> None:
        gone = set(sequences)
        self._decodes.remove(gone)
        self._running = [sequence for sequence in self._running if sequence not in gone]
        self._prompts = [sequence for sequence in self._prompts if sequence not in gone]

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)
