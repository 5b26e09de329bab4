"""A model in this process, for the commands that talk to it directly."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from tessera.commands.table import proof_line, weights_line
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.errors import ConfigError
from tessera.log import logger
from tessera.model.source import find_model
from tessera.text.request_text import RequestText, TextDelta
from tessera.text.tokenizer import load_tokenizer
from tessera.types import Request, SamplingParams


class LocalModel:
    """An engine and its tokenizer.

    chats  whether it will be given messages: ConfigError, before weights are read, where it has no chat template
    """

    def __init__(self, config: EngineConfig, *, chats: bool) -> None:
        source = find_model(config.model)
        self.tokenizer = load_tokenizer(source, config.model)
        if chats and self.tokenizer.template is None:
            raise ConfigError(
                f"{source.name} has no chat template, so it cannot be talked to",
                "give one with --chat-template FILE, or use `tessera generate --prompt TEXT`",
            )
        self.engine = build_engine(config, progress=sys.stderr.isatty())
        logger.info("weights: %s", weights_line(self.engine.info))
        for choice in self.engine.info.attention:
            logger.info("%s attention: %s (%s)", choice.phase, ", ".join(choice.backends), choice.reason)
            for proof in choice.proofs:
                logger.info("%s attention %s", choice.phase, proof_line(proof))
        self._ids = itertools.count()

    def text_of(self, prompt: str, params: SamplingParams, *, add_special_tokens: bool) -> RequestText:
        """A request for the continuation of `prompt`, not yet queued."""
        token_ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        return RequestText(Request(str(next(self._ids)), token_ids, params), self.tokenizer, prompt)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the model's template writes it; encode it without special tokens."""
        return self.tokenizer.render_chat([dict(message) for message in messages])

    def generate(
        self, texts: Sequence[RequestText], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[RequestText, TextDelta]]:
        """Text as it comes, until all are finished or `stopped`, which is asked between steps.

        RequestError, before anything is computed, where one cannot be served. The engine is idle afterwards.
        """
        by_id = {text.request.request_id: text for text in texts}
        try:
            for text in texts:
                self.engine.add(text.request)
            while self.engine.has_work and not stopped():
                for output in self.engine.step():
                    delta = by_id[output.request_id].feed(output)
                    if delta.abort:
                        self.engine.abort(output.request_id, output.index)
                    yield by_id[output.request_id], delta
        finally:
            for request_id in by_id:
                self.engine.abort(request_id)


@contextlib.contextmanager
def interrupt_as_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C only sets a flag, which the returned function reads: a step is never cut in half.

    A second Ctrl-C acts as usual.
    """
    pressed = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
