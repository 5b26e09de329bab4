"""The runner: one step on one device, from a step's tokens to sampled tokens and logprobs."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tessera.attention.step import Attention
from tessera.model.language_model import LanguageModel
from tessera.runner.inputs import InputBuilder, StepInputs
from tessera.runner.sampler import Sampler, token_logprobs
from tessera.types import Sequence, Step, StepResult, TokenLogprobs

_PROMPT_LOGPROB_ROWS = 128
"""Rows of logits held at once for prompt logprobs: bounds memory at any prompt length and vocabulary."""


class Runner:
    """Owns the page pools of one device and computes steps on them.

    k_pages, v_pages  one a layer, [pages, page_size, kv_heads, head_dim]
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: Attention,
        k_pages: Items[Tensor],
        v_pages: Items[Tensor],
        device: torch.device,
    ) -> None:
        self._model, self._attention = model, attention
        self._k_pages, self._v_pages = k_pages, v_pages
        self._inputs = InputBuilder(len(k_pages[0]), k_pages[0].shape[1], device)
        self._sampler = Sampler(model.spec.eos_token_ids, device)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute a step that is not empty; its sequences' pages are written."""
        inputs = self._inputs.build(step)
        attend = self._attention.begin_step(self._k_pages, self._v_pages, inputs.slots, inputs.batches)
        hidden = self._model(inputs.token_ids, inputs.positions, attend)
        prompt_logprobs = {
            sequence: self._prompt_logprobs(hidden, inputs, sequence, num_tokens)
            for sequence, num_tokens in step.num_tokens.items()
            if sequence.wants_prompt_logprobs
        }
        if not inputs.sampling:
            return StepResult({}, {}, prompt_logprobs)
        logits = self._model.logits(hidden[inputs.sampling_rows])
        token_ids, logprobs = self._sampler.sample(logits, inputs.sampling)
        return StepResult(dict(zip(inputs.sampling, token_ids)), logprobs, prompt_logprobs)

    @torch.inference_mode()
    def logits(self, step: Step) -> Tensor:
        """[tokens, vocab] float32: the logits behind every token of a step, to measure accuracy; its pages are written.

        Rows stand as the step's sequences do, the tokens of each together.
        """
        inputs = self._inputs.build(step)
        attend = self._attention.begin_step(self._k_pages, self._v_pages, inputs.slots, inputs.batches)
        return self._model.logits(self._model(inputs.token_ids, inputs.positions, attend))

    def _prompt_logprobs(
        self, hidden: Tensor, inputs: StepInputs, sequence: Sequence, num_tokens: int
    ) -> list[TokenLogprobs]:
        """Logprobs of the prompt tokens that follow this step's tokens of `sequence`."""
        start, first = sequence.num_computed_tokens, inputs.first_rows[sequence]
        targets = sequence.token_ids[start + 1 : min(start + num_tokens + 1, sequence.num_prompt_tokens)]
        found: list[TokenLogprobs] = []
        for offset in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            piece = targets[offset : offset + _PROMPT_LOGPROB_ROWS]
            rows = hidden[first + offset : first + offset + len(piece)]
            logprobs = self._model.logits(rows).log_softmax(-1)
            found += token_logprobs(logprobs, piece, [sequence.params.prompt_logprobs or 0] * len(piece))
        return found
