"""The cases of `neighbours.py`: what each kernel and torch's operators compute, on what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tessera.kernels.norm import add_rms_norm, rms_norm
from tessera.kernels.pages import write_pages
from tessera.kernels.rope_pages import rope_pages
from tessera.kernels.sampling import sample
from tessera.kernels.swiglu import swiglu
from tessera.kernels.turn import Turn
from tessera.model.layers.rope import RotaryEmbedding, rotate
from tessera.model.spec import Rope

EPS = 1e-6
PAGE_SIZE = 16


class Widths(NamedTuple):
    """What a model's layers are made of."""

    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    qk_norm: bool


MODELS = {
    "SmolLM2-135M": Widths(576, 9, 3, 64, 1536, 49152, False),
    "Qwen3-0.6B": Widths(1024, 16, 8, 128, 3072, 151936, True),
    "Llama-3-8B": Widths(4096, 32, 8, 128, 14336, 128256, False),
}
SAMPLING: dict[str, tuple[float, ...]] = {
    "greedy": (0.0, 0, 1, 0),
    "temperature": (1.0, 0, 1, 0),
    "top_p 0.9": (1.0, 0, 0.9, 0),
    "top_k 50, top_p 0.9": (1.0, 50, 0.9, 0),
}
"""Of every row: temperature, top_k, top_p, min_p."""
MOST_SAMPLED_ROWS = 256
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One kernel at one size; both functions take the same arguments and return what they computed."""

    name: str
    model: str
    tokens: int
    num_bytes: int
    """Read and written where each number is moved once."""
    make: Callable[[], tuple[Any, ...]]
    """New arguments."""
    by_torch: Function
    fused: Function
    compiles: bool = True


def norm_by_torch(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
    """RMSNorm as a layer without kernels does it on CUDA."""
    return (functional.rms_norm(hidden, weight.shape, weight, EPS),)


def add_norm_by_torch(hidden: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A sum, then RMSNorm."""
    total = hidden + update
    return total, functional.rms_norm(total, weight.shape, weight, EPS)


def swiglu_by_torch(gate_up: Tensor) -> tuple[Tensor]:
    """silu, then a product."""
    gate, up = gate_up.chunk(2, -1)
    return (functional.silu(gate) * up,)


def rope_pages_by_torch(
    heads: Tensor, sizes: list[int], turn: Turn, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    """Norms, rotation and write as a layer without kernels does them."""
    both, v = torch.split(heads, [sizes[0] + sizes[1], sizes[2]], 1)
    if turn.q_weight is not None and turn.k_weight is not None:
        q, k = torch.split(both, sizes[:2], 1)
        shape = turn.q_weight.shape
        normed = [functional.rms_norm(x, shape, weight, EPS) for x, weight in ((q, turn.q_weight), (k, turn.k_weight))]
        both = torch.cat(normed, 1)
    assert turn.rotation is not None
    q, k = torch.split(rotate(both, turn.rotation), sizes[:2], 1)
    write_pages(k, v, k_pages, v_pages, slots)
    return q, k_pages, v_pages


def rope_pages_fused(
    heads: Tensor, sizes: list[int], turn: Turn, k_pages: Tensor, v_pages: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    """The same in one launch."""
    q, k, v = torch.split(heads, sizes, 1)
    return rope_pages(q, k, v, turn, k_pages, v_pages, slots), k_pages, v_pages


def sample_by_torch(logits: Tensor, parameters: Tensor, kind: str) -> tuple[Tensor]:
    """Sampling by sorting the vocabulary, without a look at the device; the parameters are those of `kind`."""
    temperature, top_k, top_p, _ = SAMPLING[kind]
    if temperature == 0:
        return (logits.argmax(-1),)
    probs = (logits / temperature).softmax(-1)
    if top_k or top_p < 1:
        ordered = probs.sort(-1, descending=True).values
        if top_k:
            ordered[:, int(top_k) :] = 0
        before = ordered.cumsum(-1) - ordered
        kept = (before < top_p * ordered.sum(-1, keepdim=True)) & (ordered > 0)
        probs = probs * (probs >= ordered.gather(1, kept.sum(-1, keepdim=True) - 1))
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return (torch.searchsorted(cumulative, parameters[:, 4:] * cumulative[:, -1:], right=True)[:, 0],)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def _head_arguments(widths: Widths, tokens: int) -> tuple[Any, ...]:
    sizes = [widths.q_heads, widths.kv_heads, widths.kv_heads]
    rope = RotaryEmbedding(Rope(theta=10_000.0), widths.head_dim, torch.device("cuda"))
    rotation = rope(torch.randint(0, 4096, (tokens,), device="cuda"), torch.bfloat16)
    weights = (_random(widths.head_dim), _random(widths.head_dim)) if widths.qk_norm else (None, None)
    num_pages = 2 * -(-tokens // PAGE_SIZE)
    pools = [_random(num_pages, PAGE_SIZE, widths.kv_heads, widths.head_dim) for _ in range(2)]
    slots = torch.randperm(num_pages * PAGE_SIZE, device="cuda")[:tokens]
    heads = _random(tokens, sum(sizes), widths.head_dim)
    return heads, sizes, Turn(weights[0], weights[1], EPS, rotation), *pools, slots


def _sampling_arguments(kind: str, widths: Widths, rows: int) -> tuple[Any, ...]:
    draws = torch.randint(0, 2**32, (rows, 1), device="cuda").double() / 2**32
    same = torch.tensor(SAMPLING[kind], dtype=torch.float64, device="cuda").expand(rows, -1)
    return _random(rows, widths.vocab, dtype=torch.float32) * 3, torch.cat((same, draws), 1), kind


def layer_cases(model: str, tokens: int) -> Iterator[Case]:
    """The kernels within a layer."""
    widths = MODELS[model]
    hidden, num_heads = widths.hidden, widths.q_heads + 2 * widths.kv_heads
    yield Case(
        "RMSNorm", model, tokens, 2 * 2 * tokens * hidden, lambda: (_random(tokens, hidden), _random(hidden)),
        norm_by_torch, lambda x, weight: (rms_norm(x, weight, EPS),),
    )  # fmt: skip
    yield Case(
        "add + RMSNorm", model, tokens, 2 * 4 * tokens * hidden,
        lambda: (_random(tokens, hidden), _random(tokens, hidden), _random(hidden)),
        add_norm_by_torch, lambda x, update, weight: add_rms_norm(x, update, weight, EPS),
    )  # fmt: skip
    yield Case(
        "q/k norm + rope + write" if widths.qk_norm else "rope + write", model, tokens,
        2 * tokens * widths.head_dim * (2 * num_heads + 1) + 8 * tokens, lambda: _head_arguments(widths, tokens),
        rope_pages_by_torch, rope_pages_fused,
    )  # fmt: skip
    yield Case(
        "SwiGLU", model, tokens, 2 * 3 * tokens * widths.intermediate,
        lambda: (_random(tokens, 2 * widths.intermediate),), swiglu_by_torch, lambda x: (swiglu(x),),
    )  # fmt: skip


def sampling_cases(model: str, rows: int) -> Iterator[Case]:
    """Sampling, each way for all rows."""
    widths = MODELS[model]
    for kind in SAMPLING:
        make = partial(_sampling_arguments, kind, widths, rows)
        by_kernel: Function = lambda logits, parameters, _: (sample(logits, parameters),)  # noqa: E731
        yield Case(
            f"sample, {kind}", model, rows, 4 * rows * widths.vocab, make, sample_by_torch, by_kernel, compiles=False
        )
