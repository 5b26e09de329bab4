"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

from typing import Protocol

from tessera.engine.check import check_request
from tessera.scheduler.scheduler import Scheduler
from tessera.step import Step, StepResult
from tessera.types import EngineInfo, EngineStatus, Output, Request, Sequence


class RunningStep(Protocol):
    """A step that the device has been given."""

    def result(self) -> StepResult:
        """What it found; waits for it."""


class StepExecutor(Protocol):
    """What the engine asks of the layer below."""

    def begin(self, step: Step) -> RunningStep:
        """Give the device a step; those begun before it are computed before it."""


class Engine:
    """Schedules and runs the steps of all requests; token ids only, no text.

    overlap  whether a step is scheduled and begun before the result of the one before it is taken in, so that the
             device never waits for the host: outputs come one step late, and a sequence that ends by a stop token has
             been computed one step further for nothing

    Not thread-safe: one caller. After an exception out of `step` the engine must not be used again.
    """

    def __init__(
        self, executor: StepExecutor, scheduler: Scheduler, info: EngineInfo, seed: int = 0, *, overlap: bool = False
    ) -> None:
        self.info = info
        self._executor, self._scheduler, self._seed = executor, scheduler, seed
        self._overlap = overlap
        self._ahead: tuple[Step, RunningStep] | None = None
        self._num_requests = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is running or waiting, or a step's result is still out."""
        return self._ahead is not None or self._scheduler.num_running + self._scheduler.num_waiting > 0

    def add(self, request: Request) -> None:
        """Queue a request; RequestError, and nothing queued, where it can never be served."""
        check_request(request, self.info)
        params = request.params
        # Requests without a seed differ from one another, and repeat when the engine is run again.
        seed = params.seed if params.seed is not None else hash((self._seed, self._num_requests))
        self._num_requests += 1
        for index in range(params.n):
            wants_prompt = params.prompt_logprobs is not None and index == 0
            self._scheduler.add(
                Sequence(
                    request_id=request.request_id,
                    index=index,
                    token_ids=list(request.prompt_token_ids),
                    num_prompt_tokens=len(request.prompt_token_ids),
                    params=params,
                    seed=(seed + index) % 2**64,
                    prompt_logprobs=[None] if wants_prompt else [],
                )
            )

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its sequences; its pages are free at once. Unknown ids are no error."""
        self._scheduler.abort(request_id, index)

    def step(self) -> list[Output]:
        """Compute one step and return what it added, with `overlap` what the one before added; [] for no work."""
        outputs = self._take_in() if self._scheduler.needs_results else []
        step = self._scheduler.schedule()
        if not step.sequences:
            return outputs + self._take_in()
        self._num_steps += 1
        running = self._executor.begin(step)
        self._scheduler.begin(step)
        outputs += self._take_in()
        self._ahead = step, running
        return outputs if self._overlap else self._take_in()

    def _take_in(self) -> list[Output]:
        """What the step whose result is out has added; [] where there is none."""
        if self._ahead is None:
            return []
        (step, running), self._ahead = self._ahead, None
        return self._scheduler.commit(step, running.result())

    def status(self) -> EngineStatus:
        """The counters as they stand between two steps."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStatus(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=scheduler.pool.num_pages,
            pages_free=scheduler.pool.num_available,
            steps=self._num_steps,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
        )
