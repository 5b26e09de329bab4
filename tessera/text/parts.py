"""What a tokenizer is made of, wherever it was read from."""

from __future__ import annotations

from dataclasses import dataclass, field

import tokenizers


@dataclass(frozen=True, kw_only=True)
class TokenizerParts:
    """The outcome of reading a tokenizer: the Rust tokenizer, and what it does not hold itself."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, ... -> its text, as chat templates call them."""
    end_token_ids: tuple[int, ...] = ()
    """Ids that end a turn or a text; the end-of-sequence token first."""
    template: str | None = None
    """Source of the chat template."""
    vocab_size: int | None = None
    """Left out: as many as the backend knows."""
