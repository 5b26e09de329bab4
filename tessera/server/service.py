"""What every route needs: the engine's client, the tokenizer, and what is served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from tessera.errors import RequestError
from tessera.server.engine_client import EngineClient
from tessera.server.errors import TooLargeError, UnknownCodingError, UnknownModelError
from tessera.server.schema import MAX_BODY_BYTES
from tessera.text.tokenizer import Tokenizer
from tessera.types import EngineInfo

T = TypeVar("T")

SMALL_BYTES = 16 * 1024
"""Bodies up to here are read and tokenised on the event loop, in about a millisecond; larger ones in a thread."""


@dataclass
class Service:
    """One served model."""

    client: EngineClient
    tokenizer: Tokenizer
    info: EngineInfo
    max_token_characters: int
    """Characters of the longest token."""
    created: int = field(default_factory=lambda: int(time.time()))
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenise"))

    @property
    def max_prompt_characters(self) -> int:
        """No longer text fits into the context, whatever its tokens are."""
        return self.info.max_model_len * self.max_token_characters

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModelError for a model that is not served; None means the one that is."""
        if name is not None and name != self.info.model:
            raise UnknownModelError(
                f"the model {name!r:.200} does not exist here", f"{self.info.model!r} is served", "model"
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a prompt; RequestError when it is too long to be worth counting."""
        if len(text) > self.max_prompt_characters:
            raise RequestError(
                f"the prompt has {len(text)} characters, and {self.max_prompt_characters} is the most that could fit "
                f"into the context of {self.info.max_model_len} tokens",
                param="prompt",
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def prepare(self, size: int, work: Callable[[], T]) -> T:
        """The result of `work`, off the event loop when the body it works on is of a large `size`."""
        if size <= SMALL_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)


def max_token_characters(tokenizer: Tokenizer) -> int:
    """Characters of the longest token; reads the whole vocabulary, which takes a moment."""
    return max(1, *(len(tokenizer.token_bytes(token_id)) for token_id in range(tokenizer.vocab_size)))


async def read_body(request: HttpRequest) -> bytes:
    """The body, if it is not too large: TooLargeError as soon as that is known. UnknownCodingError for a packed one."""
    codings = ",".join(request.headers.getlist("content-encoding"))
    if {coding.strip().lower() for coding in codings.split(",")} - {"", "identity"}:
        raise UnknownCodingError(f"a body with content-encoding {codings!r:.40} is not taken", "send it as it is")
    parts: list[bytes] = []
    size = int(request.headers.get("content-length") or 0)
    if size <= MAX_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MAX_BODY_BYTES:
                break
        else:
            return b"".join(parts)
    raise TooLargeError(f"the body has {size} bytes or more, at most {MAX_BODY_BYTES} are taken")
