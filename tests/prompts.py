"""64 prompts of many kinds and lengths, for comparing one engine with another."""

from __future__ import annotations

import random

_TEXTS = (
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


def prompt_token_ids(vocab_size: int, encode: object, count: int = 64) -> list[list[int]]:
    """`count` prompts as token ids: texts, texts cut short, joined texts of several hundred tokens, random ids."""
    assert callable(encode)
    source = random.Random(0)
    texts = [list(encode(text)) for text in _TEXTS]
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
    return prompts
