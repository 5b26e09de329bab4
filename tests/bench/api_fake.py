"""The fake server, that also counts tokens: a word is one, a long word two, and it may have /tokenize; a script.

The behaviour `words` has no /tokenize; `remembers` says that every prompt lay in its cache.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import fake_server
from fake_server import Text, Writer
from tessera.bench.served.words import WORDS

NUM_ADDED = {"/v1/completions": 1, "/v1/chat/completions": 7}
"""What is added to a text, and to a message."""
LONG_WORDS = ("government", "president")
SPREAD = (0.8, 0.9, 1.05, 1.2)
"""Of SLOW_TTFT_S, in turn."""
PLAIN_ANSWER = fake_server.answer


def num_tokens(text: str) -> int:
    return sum(1 + (word in LONG_WORDS) for word in text.split())


class CountingText(Text):
    """An answer whose usage has the prompt's tokens, with delays of each prompt's own."""

    def __init__(self, mode: str, body: dict[str, Any], mine: fake_server.Answer, out: Writer, *, chat: bool) -> None:
        super().__init__(mode, body, mine, out, chat=chat)
        self.random = random.Random(repr(body.get("prompt") or body.get("messages")))
        self.place = sum(each.mode == mode for each in fake_server.RECORD)

    async def sleep(self, seconds: float) -> None:
        """In `slow`, the first tokens of any four answers in a row come 10% and more of SLOW_TTFT_S apart."""
        if self.mode == "slow" and not self.num_sent:
            await asyncio.sleep(seconds * SPREAD[self.place % len(SPREAD)])
        else:
            await super().sleep(seconds)

    def usage(self) -> dict[str, Any]:
        prompt = self.body.get("prompt", "")
        if self.chat:
            count = NUM_ADDED["/v1/chat/completions"] + num_tokens(self.body["messages"][0]["content"])
        elif isinstance(prompt, list):
            count = len(prompt)
        else:
            count = NUM_ADDED["/v1/completions"] + num_tokens(prompt)
        cached = count // 16 * 16 if self.mode == "remembers" else 1
        return super().usage() | {"prompt_tokens": count, "prompt_tokens_details": {"cached_tokens": cached}}


async def answer(method: str, path: str, body: dict[str, Any], came: float, out: Writer) -> None:
    mode, _, route = path[1:].partition("/")
    if route == "tokenize" and mode != "words":
        out.plain(200, {"tokens": [100 + WORDS.index(word) for word in body["prompt"].split()]})
    elif route == "tokenize":
        out.plain(404, {"error": {"message": "no such route"}})
    else:
        await PLAIN_ANSWER(method, path, body, came, out)


if __name__ == "__main__":
    fake_server.Text = CountingText  # type: ignore[misc]
    fake_server.answer = answer
    asyncio.run(fake_server.main())
