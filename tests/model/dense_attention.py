"""Attention in its plainest form, for models under test: every sequence whole, no cache, no pages."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tessera.kernels.turn import Turn
from tessera.model.language_model import Attend, LanguageModel
from tessera.model.spec import ModelSpec


def dense_attend(spec: ModelSpec, lengths: list[int]) -> Attend:
    """An `attend` over whole sequences packed one after another, in fp32."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn | None = None, /) -> Tensor:
        assert turn is None, "the layers are not fused here"
        parts = []
        start = 0
        for length in lengths:
            tokens = slice(start, start + length)
            one = (q[tokens].float(), k[tokens].float(), v[tokens].float())
            parts.append(_attend_one(*one, scale=spec.scale, window=spec.windows[layer]))
            start += length
        return torch.cat(parts).to(q.dtype)

    return attend


def _attend_one(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def all_logits(model: LanguageModel, *sequences: list[int]) -> list[Tensor]:
    """Logits at every position of every sequence, computed in one call: [length, vocab_size] each."""
    lengths = [len(sequence) for sequence in sequences]
    token_ids = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.inference_mode():
        hidden = model(token_ids, positions, dense_attend(model.spec, lengths))
        logits = model.logits(hidden)
    ends = list(itertools.accumulate(lengths))
    return [logits[end - length : end] for end, length in zip(ends, lengths, strict=True)]
