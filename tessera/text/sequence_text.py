"""The text of one sequence of a request, as its tokens come in."""

from __future__ import annotations

from dataclasses import dataclass, field

from tessera.text.detokenizer import Detokenizer
from tessera.text.stops import StopMatcher
from tessera.types import FinishReason, Output, SamplingParams, TokenLogprobs


@dataclass(slots=True)
class TextDelta:
    """What one Output adds to the text of one sequence: what may be shown now.

    `token_ids` and `logprobs` are those whose text is now given out to its end; a token that is held back, since its
    character is not complete or a stop string may have begun, comes with its text. Joined over all deltas, text,
    token_ids and logprobs are those of the result.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
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
        """For each token: where its text ends. Tokens without text wait for the next that has one."""

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
        silent = output.stop_token_id is not None and not self._params.include_stop_str_in_output
        shown = []
        for i, token_id in enumerate(output.token_ids):
            is_last = i == len(output.token_ids) - 1
            shown.append(self._feed_token(token_id, silent and is_last))
            if output.logprobs is not None:
                self.logprobs.append(output.logprobs[i])
            if self._stops.found is not None:
                break
        if output.finish_reason is not None and self._stops.found is None:
            shown.append(self._show(self._detokenizer.flush()))
            shown.append(self._stops.flush())
        self._settle(output)
        return self._delta("".join(shown), output)

    def _feed_token(self, token_id: int, silent: bool) -> str:
        self.token_ids.append(token_id)
        return self._show("" if silent else self._detokenizer.feed(token_id))

    def _show(self, text: str) -> str:
        """The part of what has come in by now that may be given out."""
        if not text:
            return ""
        self._num_characters += len(text)
        self._ends += [self._num_characters] * (len(self.token_ids) - len(self._ends))
        return self._stops.feed(text, counts=len(self.token_ids) > self._params.min_tokens)

    def _settle(self, output: Output) -> None:
        """Decide why the sequence has finished, if it has."""
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        elif output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if output.stop_token_id in self._params.stop_token_ids:
                self.stop_reason = output.stop_token_id

    def _delta(self, text: str, output: Output) -> TextDelta:
        self._shown.append(text)
        self._num_shown_characters += len(text)
        first, last = self._num_shown_tokens, self._count_shown_tokens()
        self._num_shown_tokens = last
        return TextDelta(
            self.index,
            text,
            self.token_ids[first:last],
            self.logprobs[first:last] if self._params.logprobs is not None else None,
            output.prompt_logprobs,
            self.finish_reason,
            self.stop_reason,
            abort=self._stops.found is not None and output.finish_reason is None,
        )

    def _count_shown_tokens(self) -> int:
        if self.finish_reason is not None:
            return len(self.token_ids)
        count, ends = self._num_shown_tokens, self._ends
        while count < len(ends) and ends[count] <= self._num_shown_characters:
            count += 1
        return count
