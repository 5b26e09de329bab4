"""The runner: one step on one device, from a step's tokens to sampled tokens and logprobs."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tessera.attention.step import Attention
from tessera.model.language_model import LanguageModel
from tessera.runner.graph_sizes import GraphLimits
from tessera.runner.graphs import StepGraphs
from tessera.runner.inputs import InputBuilder, LastSampled, StepInputs
from tessera.runner.sampler import Sampled, Sampler, logprob_entries, measure_logprobs
from tessera.runner.transfer import HostCopy
from tessera.step import Step, StepResult
from tessera.types import Sequence, TokenLogprobs

_PROMPT_LOGPROB_ROWS = 128
"""Rows of logits held at once for prompt logprobs: bounds memory at any prompt length and vocabulary."""


class RunningStep:
    """A step that the device has been given."""

    def __init__(self, sampled: Sampled | HostCopy, prompt_logprobs: dict[Sequence, list[TokenLogprobs]]) -> None:
        """`sampled`: where no token is, anything that is copied when the step is done."""
        self._sampled, self._prompt_logprobs = sampled, prompt_logprobs

    def result(self) -> StepResult:
        """What it found; waits for the device."""
        if isinstance(self._sampled, HostCopy):
            self._sampled.wait()  # or a host with long prompts would be any number of steps ahead
            return StepResult([], {}, self._prompt_logprobs)
        token_ids, logprobs = self._sampled.result()
        return StepResult(token_ids, logprobs, self._prompt_logprobs)


class Runner:
    """Owns the page pools of one device and computes steps on them.

    k_pages, v_pages  one a layer, [pages, page_size, kv_heads, head_dim]
    graph_limits      steps within these are replayed as CUDA graphs, where backends allow it; None: never
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: Attention,
        k_pages: Items[Tensor],
        v_pages: Items[Tensor],
        device: torch.device,
        graph_limits: GraphLimits | None = None,
    ) -> None:
        self._model, self._attention = model, attention
        self._k_pages, self._v_pages = k_pages, v_pages
        self._inputs = InputBuilder(len(k_pages[0]), k_pages[0].shape[1], device)
        self._sampler = Sampler(model.spec.eos_token_ids, device)
        self._last: LastSampled | None = None
        self._graphs: StepGraphs | None = None
        if graph_limits is not None:
            self._graphs = StepGraphs(model, attention, (k_pages, v_pages), self._sampler, graph_limits)

    @torch.inference_mode()
    def begin(self, step: Step) -> RunningStep:
        """Give the device a step that is not empty; its sequences' pages are written.

        A token that is pending is taken from the step that was begun before this one.
        """
        host = self._inputs.build_on_host(step, self._last)
        sampled = None if self._graphs is None else self._graphs.begin(step, host, self._last)
        if sampled is None:
            return self._compute(step, self._inputs.bring_over(step, host, self._last))
        if isinstance(sampled, Sampled):
            self._last = LastSampled(step.sampling, sampled.token_ids)
        return RunningStep(sampled, {})

    def _compute(self, step: Step, inputs: StepInputs) -> RunningStep:
        attend = self._attention.begin_step(self._k_pages, self._v_pages, inputs.slots, inputs.batches)
        hidden = self._model(inputs.token_ids, inputs.positions, attend)
        prompt_logprobs = {
            sequence: self._prompt_logprobs(hidden, inputs, sequence, step)
            for sequence in step.num_tokens
            if sequence.wants_prompt_logprobs
        }
        sampled: Sampled | HostCopy
        if not inputs.sampling:
            sampled = HostCopy([hidden[:1, :1]])
        else:
            logits = self._model.logits(hidden[inputs.sampling_rows])
            sampled = self._sampler.sample(logits, inputs.sampling)
            self._last = LastSampled(inputs.sampling, sampled.token_ids)
        return RunningStep(sampled, prompt_logprobs)

    def run(self, step: Step) -> StepResult:
        """Compute a step, to its end."""
        return self.begin(step).result()

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """[tokens, vocab] float32: the logits behind every token of a step, to measure accuracy; its pages are written.

        Rows stand as the step's sequences do, the tokens of each together.
        """
        inputs = self._inputs.build(step)
        attend = self._attention.begin_step(self._k_pages, self._v_pages, inputs.slots, inputs.batches)
        return self._model.logits(self._model(inputs.token_ids, inputs.positions, attend))

    def _prompt_logprobs(
        self, hidden: Tensor, inputs: StepInputs, sequence: Sequence, step: Step
    ) -> list[TokenLogprobs]:
        """Logprobs of the prompt tokens that follow this step's tokens of `sequence`; waits for the device."""
        start, first = step.starts[sequence], inputs.first_rows[sequence]
        end = start + step.num_tokens[sequence] + 1
        targets = sequence.token_ids[start + 1 : min(end, sequence.num_prompt_tokens)]
        num_top = sequence.params.prompt_logprobs or 0
        found: list[TokenLogprobs] = []
        for offset in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            piece = targets[offset : offset + _PROMPT_LOGPROB_ROWS]
            rows = hidden[first + offset : first + offset + len(piece)]
            logprobs = self._model.logits(rows).log_softmax(-1)
            measured = measure_logprobs(logprobs, torch.tensor(piece, device=logprobs.device), num_top)
            found += logprob_entries(piece, measured, [num_top] * len(piece))
        return found
