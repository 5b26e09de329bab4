"""How large a model's numbers may be: far above any model there is, far below what a damaged file can hold."""

from __future__ import annotations

from tessera.errors import ModelError

MOST: dict[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "num_layers": 4096,
    "num_q_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "max_position": 2**31,
}
"""Field of ModelSpec -> its largest value; each is at least 1."""
MOST_WIDTH = 2**24
"""Of all heads together: with it and `MOST`, no matrix has more elements than 64 bits can count."""


def check_size(where: str, key: str, value: object, most: int) -> int:
    """`value` where it is a whole number from 1 to `most`; else ModelError, naming the file, the key and the value."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"{where} has {key} {value!r:.80}, not a whole number", "download or convert the model again")
    if not 1 <= value <= most:
        raise ModelError(
            f"{where} has {key} {value!s:.80}, which is not from 1 to {most}", "download or convert the model again"
        )
    return value
