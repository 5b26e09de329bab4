"""64 prompts of many kinds and lengths, for comparing one engine with another."""

from __future__ import annotations

import random

from tessera.bench.quality.text import PROMPTS


def prompt_token_ids(vocab_size: int, encode: object, count: int = 64) -> list[list[int]]:
    """`count` prompts as token ids: texts, texts cut short, joined texts of several hundred tokens, random ids."""
    assert callable(encode)
    source = random.Random(0)
    texts = [list(encode(text)) for text in PROMPTS]
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
