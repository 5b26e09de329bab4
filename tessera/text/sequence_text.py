"""The text of one sequence of a request, as its tokens come in."""

from __future__ import annotations

import msgspec

from tessera.text.detokenizer import Detokenizer
from tessera.text.stops import StopMatcher
from tessera.types import FinishReason, Output, SamplingParams, TokenLogprobs


class TextDelta(msgspec.Struct, gc=False):
    """What one Output adds to the text of one sequence: what may be shown now.

    `token_ids` and `logprobs` are those whose text is now given out to its end; a token that is held back, since its
    character is not complete or a stop string may have begun, comes with its text. Joined over all deltas, text,
    token_ids and logprobs are those of the result.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token id, where asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token, once, with the first delta of index 0."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string, or the id out of `stop_token_ids`, that ended the sequence; None for the model's own end."""
    abort: bool = False
    """The engine still computes this sequence and must be told to stop."""


class SequenceText:
    """One sequence: its tokens, its text, and how much of both was given out.

    Where a stop string ends the text, `token_ids` end with the token that completed it. The text of the end token is
    no part of the text, unless `include_stop_str_in_output` asks for it.
    """

    def __init__(self, index: int, params: SamplingParams, detokenizer: Detokenizer, stops: StopMatcher) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._detokenizer = detokenizer
        self._stops = stops
        self._shown: list[str] = []
        self._num_shown_characters = 0
        self._num_shown_tokens = 0
        self._num_characters = 0
        self._ends: list[int] = []
        """For each token: where its text ends. Tokens without text wait for the next that has one. Nobody asks where
        there is no stop string."""

    @property
    def text(self) -> str:
        """All the text given out so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def feed(self, output: Output) -> TextDelta:
        """Take the new tokens; nothing once the sequence has finished."""
        if self.finish_reason is not None:
            return TextDelta(self.index)
        text = self._watched(output) if self._stops.watches else self._unwatched(output)
        if output.finish_reason is not None or self._stops.found is not None:
            self._settle(output)
        if text:
            self._shown.append(text)
        first, last = self._num_shown_tokens, self._count_shown_tokens(len(text))
        self._num_shown_tokens = last
        return TextDelta(
            self.index,
            text,
            self.token_ids[first:last],
            None if self._params.logprobs is None else self.logprobs[first:last],
            output.prompt_logprobs,
            self.finish_reason,
            self.stop_reason,
            self._stops.found is not None and output.finish_reason is None,
        )

    def _unwatched(self, output: Output) -> str:
        """What the new tokens add where no stop string is looked for: nothing is held back but half a character."""
        token_ids = output.token_ids
        self.token_ids += token_ids
        if output.logprobs is not None:
            self.logprobs += output.logprobs
        if output.finish_reason is None:
            return self._detokenizer.feed(token_ids)
        return (
            self._detokenizer.feed(token_ids[:-1] if self._is_silent(output) else token_ids) + self._detokenizer.flush()
        )

    def _watched(self, output: Output) -> str:
        """What the new tokens add up to the one that completes a stop string; those after it are dropped."""
        silent = self._is_silent(output)
        shown = []
        for i, token_id in enumerate(output.token_ids):
            self.token_ids.append(token_id)
            if output.logprobs is not None:
                self.logprobs.append(output.logprobs[i])
            if not (silent and i == len(output.token_ids) - 1):
                shown.append(self._show(self._detokenizer.feed([token_id])))
            if self._stops.found is not None:
                return "".join(shown)
        if output.finish_reason is not None:
            shown.append(self._show(self._detokenizer.flush()))
            shown.append(self._stops.flush())
        return "".join(shown)

    def _is_silent(self, output: Output) -> bool:
        """Whether the last new token is an end token without a text."""
        return output.stop_token_id is not None and not self._params.include_stop_str_in_output

    def _show(self, text: str) -> str:
        """The part of what has come in by now that may be given out."""
        if not text:
            return ""
        self._num_characters += len(text)
        self._ends += [self._num_characters] * (len(self.token_ids) - len(self._ends))
        return self._stops.feed(text, counts=len(self.token_ids) > self._params.min_tokens)

    def _settle(self, output: Output) -> None:
        """Decide why the sequence has finished."""
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        else:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in self._params.stop_token_ids:
                self.stop_reason = output.stop_token_id

    def _count_shown_tokens(self, num_new_characters: int) -> int:
        """How many tokens have been given out to the end of their text, `num_new_characters` just now."""
        if self.finish_reason is not None:
            return len(self.token_ids)
        if not self._stops.watches:
            return len(self.token_ids) - self._detokenizer.num_open
        self._num_shown_characters += num_new_characters
        count, ends = self._num_shown_tokens, self._ends
        while count < len(ends) and ends[count] <= self._num_shown_characters:
            count += 1
        return count
