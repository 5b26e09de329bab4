"""Log-probabilities in the two shapes OpenAI has: four lists for completions, objects for chats.

They are the model's own, before temperature and truncation. JSON has no infinity: an impossible token
is given MIN_LOGPROB, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.server.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from tessera.text.tokenizer import Tokenizer
from tessera.types import TokenLogprobs

MIN_LOGPROB = -9999.0
BYTES_PER_ENTRY = 32


def clip(logprob: float) -> float:
    """`logprob`, or the lowest that is sent."""
    return max(logprob, MIN_LOGPROB)


class CompletionLogprobsWriter:
    """Renders the tokens of one choice, piece by piece; it remembers how long the text is."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top
        self._offset = 0

    def skip(self, text: str) -> None:
        """Count text that is sent without logprobs."""
        self._offset += len(text)

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """The next tokens, one entry in each list a token; an entry of None has no logprob (a prompt's first)."""
        reply = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            text = self._tokenizer.token_text(token_id)
            reply.tokens.append(text)
            reply.token_logprobs.append(None if entry is None else clip(entry.logprob))
            reply.top_logprobs.append(None if entry is None else self._top(text, entry))
            reply.text_offset.append(self._offset)
            self._offset += len(text)
        return reply

    def _top(self, text: str, entry: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and always the chosen one, which alone may go by a text that others share."""
        top: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._num_top]:
            key = text if token_id == entry.token_id else self._tokenizer.token_text(token_id)
            if token_id != entry.token_id and (key == text or key in top):
                key = f"token_id:{token_id}"
            top[key] = clip(logprob)
        top.setdefault(text, clip(entry.logprob))
        return top


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer, num_top: int) -> ChatLogprobs:
    """Logprobs of a chat's tokens, each with its UTF-8 bytes."""

    def one(token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(tokenizer.token_text(token_id), clip(logprob), list(tokenizer.token_bytes(token_id)))

    return ChatLogprobs(
        [
            TokenLogprob(
                (chosen := one(entry.token_id, entry.logprob)).token,
                chosen.logprob,
                chosen.bytes,
                [one(token_id, logprob) for token_id, logprob in entry.top[:num_top]],
            )
            for entry in entries
        ]
    )


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, num_top: int) -> PromptLogprobs:
    """A prompt's logprobs in vLLM's shape: the likeliest tokens by id, and the prompt's own."""

    def one(token_id: int, logprob: float, rank: int) -> dict[str, object]:
        return {"logprob": clip(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}

    return [
        None
        if entry is None
        else {str(entry.token_id): one(entry.token_id, entry.logprob, entry.rank)}
        | {str(token_id): one(token_id, logprob, i + 1) for i, (token_id, logprob) in enumerate(entry.top[:num_top])}
        for entry in entries
    ]


def prompt_logprobs_bytes(entries: Sequence[TokenLogprobs | None] | None) -> int:
    """About how large a prompt's logprobs are when rendered; 0 where there are none."""
    return BYTES_PER_ENTRY * sum(1 + len(entry.top) for entry in entries or () if entry)
