"""Outputs of one sequence as one, so that text is made once for all the tokens that wait."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.types import Output


def joined(outputs: Sequence[Output]) -> Output:
    """One Output that says what `outputs`, one or more of one sequence in their order, say; nothing is lost."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    logprobs = [each for output in outputs if output.logprobs is not None for each in output.logprobs]
    prompts = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return Output(
        last.request_id,
        last.index,
        [token_id for output in outputs for token_id in output.token_ids],
        logprobs or None,
        prompts[0] if prompts else None,
        last.finish_reason,
        last.stop_token_id,
        max([output.num_cached_tokens for output in outputs]),
    )
