"""From a request's Outputs to its texts: the one place where token ids become what a user reads."""

from __future__ import annotations

from tessera.text.detokenizer import make_detokenizer
from tessera.text.outputs import joined
from tessera.text.sequence_text import SequenceText, TextDelta
from tessera.text.stops import StopMatcher, StopStrings
from tessera.text.tokenizer import Tokenizer
from tessera.types import CompletionOutput, Logprob, Output, Request, RequestOutput, TokenLogprobs

__all__ = ["RequestText", "TextDelta"]

MAX_GATHERED = 64
"""Outputs of a sequence that are kept before their text is made."""


class RequestText:
    """The texts of one request's `n` sequences.

    A sequence ends with the first of: a stop string, complete after more than `min_tokens` tokens (finish_reason
    `stop`, stop_reason the string); what the engine says (`stop` with stop_reason None for the model's end token and
    the id for one of `stop_token_ids`, `length`, `abort`). What the engine sends for it afterwards is ignored.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None) -> None:
        self.request = request
        self.prompt = prompt
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self.num_cached_tokens = 0
        """Prompt tokens that were found in the prefix cache."""
        params = request.params
        stops = StopStrings(params.stop)
        self._sequences = [
            SequenceText(
                index,
                params,
                make_detokenizer(tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens),
                StopMatcher(stops, include=params.include_stop_str_in_output),
            )
            for index in range(params.n)
        ]
        self._gathered: list[list[Output]] = [[] for _ in range(params.n)]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the result so far, over all sequences; those held back count, those after a stop string do not."""
        return sum([len(sequence.token_ids) for sequence in self._sequences])

    def feed(self, output: Output) -> TextDelta:
        """Take one Output of this request and say what it adds; `abort` where the engine must stop the sequence."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        return self._sequences[output.index].feed(output)

    def gather(self, output: Output) -> TextDelta | None:
        """`feed` for those who read the result alone: None while Outputs wait, so that their text is made at once.

        None waits where a stop string may end a sequence; all have been fed when a sequence has finished.
        """
        if self.request.params.stop:
            return self.feed(output)
        gathered = self._gathered[output.index]
        gathered.append(output)
        if output.finish_reason is None and len(gathered) < MAX_GATHERED:
            return None
        self._gathered[output.index] = []
        return self.feed(joined(gathered))

    def result(self) -> RequestOutput:
        """Everything so far, shaped as vLLM's."""
        return RequestOutput(
            self.request.request_id,
            self.prompt,
            self.request.prompt_token_ids,
            [self._completion(sequence) for sequence in self._sequences],
            self.finished,
            None if self._prompt_logprobs is None else [self._entry(item) for item in self._prompt_logprobs],
            self.num_cached_tokens,
        )

    def _completion(self, sequence: SequenceText) -> CompletionOutput:
        wanted = self.request.params.logprobs is not None
        return CompletionOutput(
            sequence.index,
            sequence.text,
            list(sequence.token_ids),
            sum(item.logprob for item in sequence.logprobs) if wanted else None,
            [self._table(item) for item in sequence.logprobs] if wanted else None,
            sequence.finish_reason,
            sequence.stop_reason,
        )

    def _entry(self, item: TokenLogprobs | None) -> dict[int, Logprob] | None:
        return None if item is None else self._table(item)

    def _table(self, item: TokenLogprobs) -> dict[int, Logprob]:
        """Token id -> entry: the token itself first, then the most likely ones."""
        text = self._tokenizer.token_text
        table = {item.token_id: Logprob(item.logprob, item.rank, text(item.token_id))}
        for rank, (token_id, logprob) in enumerate(item.top, start=1):
            table.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
        return table
