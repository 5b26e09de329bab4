"""What a model is, as numbers: everything its layers are built from, whatever file they were read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from tessera.errors import ModelError
from tessera.model.limits import MOST, MOST_WIDTH, check_size

RopeScaling = Literal["default", "linear", "llama3", "yarn", "factors"]
_SMALLEST, _LARGEST = 1e-18, 1e18
"""Of rotary settings: what lies beyond overflows in the computation, and no model has it."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How positions turn queries and keys; `layers.rope` computes with it."""

    theta: float
    """Base of the frequencies."""
    scaling: RopeScaling = "default"
    factor: float = 1.0
    """How much longer than trained, in linear, llama3 and yarn."""
    original_max_position: int = 0
    """Positions seen before scaling, in llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the two ends of its ramp to whole dimensions."""
    attention_factor: float = 1.0
    """Multiplies cosine and sine, in yarn."""
    factors: tuple[float, ...] = ()
    """In `factors`: what each of the head_dim / 2 frequencies is divided by."""

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            if not _SMALLEST <= getattr(self, name) <= _LARGEST:
                raise ModelError(f"the rotary setting {name} is {getattr(self, name)}, not a positive number of use")
        if self.scaling in ("llama3", "yarn") and self.original_max_position <= 0:
            raise ModelError(f"{self.scaling} rope scaling without original_max_position_embeddings")
        if self.original_max_position > MOST["max_position"]:
            raise ModelError(f"rope scaling with original_max_position_embeddings {self.original_max_position:.3g}")
        if self.scaling == "yarn" and self.theta <= 1:
            raise ModelError(f"yarn rope scaling with theta {self.theta}, which must be above 1")
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                f"llama3 rope scaling with low_freq_factor {self.low_freq_factor} not between 0 and "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if any(not 0 < value < float("inf") for value in self.factors):
            raise ModelError("a rotary frequency factor is not a positive number")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model's architecture; ModelError where its numbers contradict one another."""

    architecture: str
    """Hugging Face's model_type."""
    vocab_size: int
    """Rows of the embedding: at least the tokenizer's vocabulary."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    """Longest sequence the model was made for."""
    norm_eps: float
    dtype: torch.dtype
    """Of the checkpoint; bfloat16 for quantised weights, which have no float type of their own."""
    scale: float
    """Multiplies q·k before the softmax."""
    windows: tuple[int | None, ...]
    """One a layer: a token sees itself and `window - 1` tokens before it; None: all before it."""
    eos_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    """Whether the output head is the embedding."""
    activation: str
    """A key of layers.mlp.ACTIVATIONS."""
    rope: Rope | None = None
    """None: learned positions."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """Whether each head of q and k is normalised before the rotation."""

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            check_size("the model", name, getattr(self, name), most)
        check_size("the model", "num_q_heads times head_dim", self.num_q_heads * self.head_dim, MOST_WIDTH)
        if not 0 <= self.norm_eps < 1:
            raise ModelError(f"the model's norm epsilon is {self.norm_eps!r}, not a number from 0 to 1")
        if self.num_q_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_q_heads} query heads cannot share {self.num_kv_heads} key heads evenly")
        if len(self.windows) != self.num_layers:
            raise ModelError(f"the model has {self.num_layers} layers and {len(self.windows)} attention windows")
        for window in {repr(window): window for window in self.windows if window is not None}.values():
            check_size("the model", "sliding_window", window, MOST["max_position"])
        if self.rope is not None and self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd, so it cannot be rotated")
