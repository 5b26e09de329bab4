"""Whether a request can be served at all, told before any work is done for it."""

from __future__ import annotations

from tessera.errors import RequestError
from tessera.types import EngineInfo, Request


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise RequestError, naming the field, for a request this engine can never serve."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("the prompt is empty: it has no tokens", "send at least one token", param="prompt")
    room = info.max_model_len - len(prompt)
    if room < 0 or (room == 0 and params.max_tokens != 0):
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the context holds {info.max_model_len} (prompt and output together)",
            "shorten the prompt, or serve with a larger --max-model-len where the model and memory allow it",
            param="prompt",
        )
    if params.min_tokens > room:
        raise RequestError(
            f"min_tokens {params.min_tokens} is more than the {room} tokens of context left after the prompt",
            param="min_tokens",
        )
    _check_token_ids("prompt", min(prompt), max(prompt), info.vocab_size)
    for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        if token_ids:
            _check_token_ids(name, min(token_ids), max(token_ids), info.vocab_size)


def check_max_tokens(request: Request, info: EngineInfo) -> None:
    """Raise RequestError where a client asked for more tokens than the context can hold after its prompt.

    For values a client gave itself; a default just ends where the context does, with finish reason "length".
    """
    num_prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    room = info.max_model_len - num_prompt
    if max_tokens is not None and max_tokens > room:
        raise RequestError(
            f"max_tokens {max_tokens} and a prompt of {num_prompt} tokens need {num_prompt + max_tokens} tokens, "
            f"the context holds {info.max_model_len}",
            f"use max_tokens {room} or less, or leave it out",
            param="max_tokens",
        )


def _check_token_ids(name: str, lowest: int, highest: int, vocab_size: int) -> None:
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise RequestError(f"{name} has token id {wrong}, the vocabulary has 0 to {vocab_size - 1}", param=name)
