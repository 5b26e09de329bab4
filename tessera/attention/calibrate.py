"""Where a model's attention scores lie, measured on prompts, for the one maximum of FlashDecoding++ (arXiv 2311.01282).

A kernel that takes every weight relative to one number phi needs no running maximum, as long as the greatest score of
each row of each span of keys lies near phi: `SAFE_LOG2` says how near. `Calibration` is fed the queries and keys of
every layer and finds the phi under which the most of them do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from tessera.attention.contract import Shape
from tessera.errors import ConfigError

SAFE_LOG2 = {torch.float16: (-6.0, 15.0), torch.bfloat16: (-64.0, 64.0), torch.float32: (-64.0, 64.0)}
"""How far below and above phi the greatest score of a row may lie, in units of log2, by the type of the weights.

A float16 weight is at most 65504 = 2**16, and below 2**-14 it loses bits: at 2**-6 the greatest still leaves 2**-8 of
itself with all bits, and what is less is off by 2**-19 of it at most. The others have float32's exponents, where the
sums of 2**17 tokens stay far from both ends.
"""
QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)
STEP = 0.125
"""Scores that are told apart, in units of the natural logarithm as all here: how exact quantiles and phi are."""
LARGEST = 2048.0
"""Scores beyond this, both ways, are counted as this."""
MAX_QUERIES = 256
"""Of a sequence whose scores are held at a time."""


@dataclass(frozen=True)
class ScoreRange:
    """Where scores of one layer, or of all, lie."""

    highest: float
    """The greatest score."""
    quantiles: dict[float, float]
    """Of all scores, by share: those of `QUANTILES`."""
    peak_quantiles: dict[float, float]
    """Likewise of the greatest score of each row of each span, which is what has to lie near phi."""
    safe_share: float
    """Of these, how many lie near enough to phi to be right as they are; the others are computed twice."""


@dataclass(frozen=True)
class UnifiedMax:
    """What a calibration found."""

    phi: float
    """The number to take weights relative to."""
    layers: dict[int, ScoreRange]
    model: ScoreRange
    """All layers together, for which phi is chosen."""


class _Histogram:
    """Counts of numbers in steps of `STEP`."""

    def __init__(self, counts: Tensor | None = None, highest: float = -float("inf")) -> None:
        self.counts = torch.zeros(round(2 * LARGEST / STEP) + 1, dtype=torch.int64) if counts is None else counts
        self.highest = highest

    def add(self, numbers: Tensor) -> None:
        """Count finite numbers, and not those that are hidden, -inf."""
        seen = numbers[numbers > -torch.inf].float()
        if len(seen):
            self.highest = max(self.highest, float(seen.max()))
            bins = ((seen.clamp(-LARGEST, LARGEST) + LARGEST) / STEP).round().long()
            self.counts += torch.bincount(bins.cpu(), minlength=len(self.counts))

    def __add__(self, other: _Histogram) -> _Histogram:
        return _Histogram(self.counts + other.counts, max(self.highest, other.highest))

    def quantiles(self) -> dict[float, float]:
        """The least number that so large a share is no greater than."""
        ends, total = self.counts.cumsum(0), int(self.counts.sum())
        wanted = torch.tensor([share * total for share in QUANTILES], dtype=torch.float64)
        bins = torch.searchsorted(ends.double(), wanted).clamp(max=len(ends) - 1)
        return {share: float(at) * STEP - LARGEST for share, at in zip(QUANTILES, bins)}

    def share_within(self, low: float, high: float) -> float:
        """How many of the numbers lie between, both ends included."""
        value = torch.arange(len(self.counts)) * STEP - LARGEST
        return float(self.counts[(value >= low) & (value <= high)].sum() / self.counts.sum())

    def best_start(self, width: float) -> float:
        """Where an interval of so large a width begins that holds the most numbers: the middle of all such places."""
        ends = torch.nn.functional.pad(self.counts.cumsum(0), (1, 0))
        steps = min(int(width / STEP), len(self.counts) - 1)
        held = ends[steps + 1 :] - ends[: -steps - 1]
        best = (held == held.max()).nonzero().flatten()
        # Where as many are held from places far apart, the middle of the first run of them.
        run = int((best.diff() > 1).nonzero()[0]) if (best.diff() > 1).any() else len(best) - 1
        return float((best[0] + best[run]) // 2) * STEP - LARGEST


class Calibration:
    """Gathers the scores of prompts, layer by layer.

    shapes  of each layer, as a backend would be bound to it: its heads, scale, window and soft cap count
    span    keys that one program goes through: rows are held against phi once a span
    """

    def __init__(self, shapes: Sequence[Shape], span: int = 256) -> None:
        self._shapes, self._span = list(shapes), span
        self._scores = [_Histogram() for _ in shapes]
        self._peaks = [_Histogram() for _ in shapes]

    @torch.inference_mode()
    def observe(self, layer: int, q: Tensor, k: Tensor, lens: Sequence[int]) -> None:
        """Count the scores of whole sequences in one layer, each token's with itself and those before.

        q     [tokens, q_heads, head_dim], packed, positions applied
        k     [tokens, kv_heads, head_dim]
        lens  tokens of each sequence; 0 for padding
        """
        begin = 0
        for length in lens:
            for scores in self._scores_of(self._shapes[layer], q[begin : begin + length], k[begin : begin + length]):
                self._scores[layer].add(scores)
                for span in torch.split(scores, self._span, dim=-1):
                    self._peaks[layer].add(span.amax(-1))
            begin += length

    def find(self, dtype: torch.dtype) -> UnifiedMax:
        """The phi under which the most rows are safe with weights of `dtype`, and how many are.

        Raises ConfigError where nothing was observed.
        """
        peaks, scores = (sum(of[1:], of[0]) for of in (self._peaks, self._scores))
        if not int(peaks.counts.sum()):
            raise ConfigError("no score was observed, so that no maximum can be found", "run a prompt of a few tokens")
        low, high = (end * log(2.0) for end in SAFE_LOG2[dtype])
        phi = peaks.best_start(high - low) - low

        def described(peaks: _Histogram, scores: _Histogram) -> ScoreRange:
            share = peaks.share_within(phi + low, phi + high)
            return ScoreRange(scores.highest, scores.quantiles(), peaks.quantiles(), share)

        layers = {
            layer: described(*of) for layer, of in enumerate(zip(self._peaks, self._scores)) if of[0].counts.any()
        }
        return UnifiedMax(phi, layers, described(peaks, scores))

    def _scores_of(self, shape: Shape, q: Tensor, k: Tensor) -> Iterator[Tensor]:
        """[kv_heads, group, queries, keys], -inf where hidden, of a few queries at a time."""
        position = torch.arange(len(q), device=q.device)
        for rows in torch.split(position, MAX_QUERIES):
            grouped = q[rows].float().reshape(len(rows), shape.num_kv_heads, -1, q.shape[2])
            scores = torch.einsum("qhgd,khd->hgqk", grouped, k.float()) * shape.scale
            if shape.soft_cap is not None:
                scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
            distance = rows[:, None] - position
            hidden = distance < 0
            if shape.window is not None:
                hidden |= distance >= shape.window
            yield scores.masked_fill(hidden, -torch.inf)
