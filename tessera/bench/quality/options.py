"""What `tessera bench quality` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tessera.config import Ranges


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """How much is answered and read, and which tasks of lm-eval are run."""

    dtypes: str | None = None
    """Comma separated types to run every backend in; the reference is always naive in float32. Left out: the type
    that the model is served in here."""
    prompts: int = 16
    """Prompts that are answered greedily, led by the reference and free."""
    tokens: int = 64
    """Tokens of each answer."""
    decode_batch: int | None = None
    """Sequences that are decoded in one step: what serves few is not always what serves many. Left out: all."""
    text: str | None = None
    """UTF-8 file for perplexity. Left out: the prose of Python's own `pydoc_data.topics`."""
    window: int = 512
    """Tokens a window of the text; the first of each is given, the others are predicted."""
    windows: int = 8
    """Windows, from the beginning of the text, none overlapping another."""
    lm_eval: str | None = None
    """Comma separated tasks of lm-eval, run through our server once a backend, in place of all of the above."""
    lm_eval_path: str | None = None
    """Folder with task files of your own; data files that they name are looked for from there."""
    lm_eval_python: str | None = None
    """Python of the environment that has lm-eval. Left out: this one."""
    lm_eval_transformers: bool = False
    """Run the tasks with transformers too (lm-eval's own `hf` model), on the same weights."""
    limit: int | None = None
    """Examples of each task. Left out: all."""

    RANGES: ClassVar[Ranges] = {
        "prompts": (1, 4096),
        "tokens": (1, 100_000),
        "decode_batch": (1, 4096),
        "window": (2, 2**20),
        "windows": (1, 100_000),
        "limit": (1, 10_000_000),
    }
