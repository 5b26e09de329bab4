"""Everything that crosses a layer: what a user asks, what a step computes, what comes back.

`Request`, `SamplingParams` and `Output` also cross the wire between the API process and the
engine process, so they hold plain data only (msgspec encodes them; nothing is pickled).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec

from tessera.sampling_params import SamplingParams as SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids, and how to continue it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's log-probability, its rank (1: most likely), and the most likely tokens there.

    `top` is [(token_id, logprob), ...], most likely first; the same float wherever the token appears.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Output(msgspec.Struct, frozen=True, gc=False):
    """What one step added to one sequence of one request; one a token, so it must be made in no time."""

    request_id: str
    index: int
    """Which of the request's `n` sequences."""
    token_ids: list[int]
    """New since the last Output; the end token that stopped a sequence is the last of them."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a new token, where asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token (the first is None), once, with the first Output of index 0."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The end token that stopped the sequence; None when it was stopped by something else."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One text being generated: its tokens, and how much of it is in the KV cache.

    Changed by the scheduler only. `token_ids[num_computed_tokens:]` is still to compute.
    """

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    """Seed of this sequence: never None, already offset by `index`."""
    pages: list[int] = field(default_factory=list)
    """Page table: token t lies in page `pages[t // page_size]`."""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    page_hashes: list[bytes] = field(default_factory=list)
    """Hash chain over the full pages of `token_ids` that are known so far (see scheduler.prefix)."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_preemptions: int = 0
    finished: bool = False
    """Whether nothing more is wanted of it; what a step that has begun still finds is dropped."""
    most_tokens: int = 0
    """Tokens that it may have, the prompt's included; the scheduler says."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end it, once it has `min_tokens`; the scheduler says."""
    asks_more: bool = field(init=False)
    """Whether its outputs are anything but one token each."""

    def __post_init__(self) -> None:
        asked = self.params.logprobs, self.params.prompt_logprobs
        self.asks_more = asked != (None, None) or self.params.max_tokens == 0

    @property
    def num_pending(self) -> int:
        """Tokens sampled in steps that have begun and whose results are not in: they follow `token_ids`, unknown.

        A step that computes the last token samples the next one. One that has been preempted since is not counted.
        """
        return max(0, self.num_computed_tokens + 1 - len(self.token_ids))

    @property
    def num_tokens(self) -> int:
        """Tokens known and pending."""
        return max(len(self.token_ids), self.num_computed_tokens + 1)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those that are pending included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def needs_results(self) -> bool:
        """Whether no step of it can be prepared while results are out: penalties want the tokens themselves."""
        return self.params.has_penalties or self.wants_prompt_logprobs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logits are still owed; such a sequence may not skip prompt tokens by a prefix hit.

        Only the first of a request's sequences computes them.
        """
        asked = self.params.prompt_logprobs is not None and self.index == 0
        return asked and len(self.prompt_logprobs) < self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class KernelUse:
    """A CUDA kernel, on a CPU an operator, that a profiler saw in one step."""

    name: str
    calls: int
    microseconds: float
    """Of all calls together; of an operator without those it calls, unless it is claimed."""


@dataclass(frozen=True, slots=True)
class AttentionProof:
    """What a backend was seen to run, by a profiler, on this machine, when the engine started."""

    phase: str
    backend: str
    variant: str | None
    """The part of the backend's name behind the colon."""
    symbols: list[KernelUse]
    """The kernels that its claim names, as they ran in one step of the model; called alone where `time_share` is
    None."""
    time_share: float | None
    """Those kernels' part of all kernel time (on a CPU: operator time) in the step; None where no step was run."""
    step: str
    """The size of what was profiled, as in AttentionBucket."""
    versions: dict[str, str]
    """Of torch and of each distribution that decides what runs."""
    device: str


@dataclass(frozen=True, slots=True)
class AttentionBucket:
    """A size of step, what was measured there, and which backend serves steps near it."""

    size: str
    """As in `8 x 512`: sequences and tokens each holds; `1 x 128 of 512` where only some of them are new."""
    num_seqs: int
    q_len: int
    """New tokens a sequence."""
    kv_len: int
    """Tokens a sequence holds, the new ones included."""
    backend: str
    runner_up: str | None
    """The fastest of the others."""
    times_ms: dict[str, float]
    """Of one layer, the step's planning shared out among the layers; every backend that was timed, fastest first."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """Which backend serves a phase, and why it and not another."""

    phase: str
    backend: str
    """Where sizes of step have different ones: that of most `buckets`."""
    reason: str
    rejected: dict[str, list[str]] = field(default_factory=dict)
    """Every other candidate and each reason against it."""
    buckets: list[AttentionBucket] = field(default_factory=list)
    """What each size of step is served by, where that was measured."""
    proofs: list[AttentionProof] = field(default_factory=list)
    """One a backend of this phase, where proof was asked for."""

    @property
    def backends(self) -> list[str]:
        """Every backend that serves some size of step, `backend` first."""
        return list(dict.fromkeys([self.backend, *(bucket.backend for bucket in self.buckets)]))


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is once it has started; it never changes afterwards."""

    model: str
    """The name the model is served under."""
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention: list[AttentionChoice]
    load_seconds: float = 0.0
    num_four_bit_layers: int = 0
    """Linear layers that multiply steps of few tokens by the file's own 4-bit weights: see DeviceConfig."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Counters of a running engine, read between two steps."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    """Free or only remembered by the prefix cache: what a new sequence could take."""
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One entry of a `logprobs` dictionary (shaped like vLLM's)."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One generated text of a request (shaped like vLLM's)."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the end-of-sequence token."""


@dataclass(slots=True)
class RequestOutput:
    """A request's prompt and its texts (shaped like vLLM's)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
