"""What ends a sequence, and what is said of the token that may have done so."""

from __future__ import annotations

from tessera.types import FinishReason, Output, Sequence, TokenLogprobs


def set_ends(sequence: Sequence, max_model_len: int, eos_token_ids: frozenset[int]) -> None:
    """Tell a sequence how many tokens it may have and which tokens end it, so that a step need only compare."""
    params = sequence.params
    sequence.most_tokens = max_model_len
    if params.max_tokens is not None:
        sequence.most_tokens = min(max_model_len, sequence.num_prompt_tokens + max(params.max_tokens, 1))
    own_of_model = frozenset[int]() if params.ignore_eos else eos_token_ids
    sequence.stop_token_ids = own_of_model.union(params.stop_token_ids) if params.stop_token_ids else own_of_model


def append(sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None) -> Output:
    """Add a sampled token, or find that none was wanted, and say what became of the sequence."""
    wanted = sequence.params.max_tokens != 0
    first = len(sequence.token_ids) == sequence.num_prompt_tokens
    if wanted:
        sequence.token_ids.append(token_id)
    reason = _finish_reason(sequence)
    return Output(
        request_id=sequence.request_id,
        index=sequence.index,
        token_ids=[token_id] if wanted else [],
        logprobs=[logprobs] if wanted and logprobs is not None else None,
        prompt_logprobs=sequence.prompt_logprobs if first and sequence.prompt_logprobs else None,
        finish_reason=reason,
        stop_token_id=token_id if reason == "stop" else None,
        num_cached_tokens=sequence.num_cached_tokens,
    )


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    params, num_output = sequence.params, len(sequence.token_ids) - sequence.num_prompt_tokens
    if num_output >= max(params.min_tokens, 1) and sequence.token_ids[-1] in sequence.stop_token_ids:
        return "stop"
    return "length" if params.max_tokens == 0 or len(sequence.token_ids) >= sequence.most_tokens else None
