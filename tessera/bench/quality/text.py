"""Real text to measure models on: prompts of many kinds, and prose that every Python brings."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tessera.errors import ConfigError

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Translate to German: Good morning, how are you today?",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Once upon a time, in a village at the edge of a dark forest, there lived",
    "Explain photosynthesis to a ten year old child in three sentences.",
    "SELECT name, age FROM people WHERE",
    "Die Hauptstadt von Deutschland ist",
    "Les trois plus grandes villes de France sont",
    "import numpy as np\n\nx = np.arange(10)\nprint(",
    "Q: If I have 3 apples and buy 4 more, how many do I have?\nA:",
    "<html>\n  <head>\n    <title>",
    "日本の首都は",
    "The theory of relativity says that",
)
MAX_PROMPT_TOKENS = 400


def prompt_ids(encode: Callable[[str], list[int]], vocab_size: int, count: int) -> list[list[int]]:
    """`count` prompts as token ids, always the same: texts, texts cut short, several joined, random ids."""
    source = random.Random(0)
    texts = [encode(text) for text in PROMPTS]
    prompts: list[list[int]] = []
    for number in range(count):
        kind, text = number % 4, texts[number // 4 % len(texts)]
        if kind == 0:
            prompts.append(text)
        elif kind == 1:
            prompts.append(text[: source.randint(1, max(1, len(text) - 1))])
        elif kind == 2:
            prompts.append([token for _ in range(source.randint(2, 8)) for token in source.choice(texts)] + text)
        else:
            prompts.append([source.randrange(vocab_size) for _ in range(source.randint(1, 120))])
    return [prompt[:MAX_PROMPT_TOKENS] for prompt in prompts]


def read_text(path: str | None) -> tuple[str, str]:
    """(name, text) of a file, or of the help texts that CPython brings; ConfigError for a file that is none."""
    if path is None:
        from pydoc_data.topics import topics

        return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return Path(path).name, Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read: {error}", "give a file of UTF-8 text") from None


def windows(token_ids: list[int], length: int, count: int) -> list[list[int]]:
    """The first `count` pieces of `length` tokens; ConfigError where the text is too short."""
    if len(token_ids) < length * count:
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, {count} windows of {length} need {length * count}",
            f"use --windows {len(token_ids) // length} or a longer --text"
            if len(token_ids) >= length
            else "use a smaller --window or a longer --text",
        )
    return [token_ids[start : start + length] for start in range(0, length * count, length)]
