"""What `same_answers.py` holds answers against: transformers on the same weights, and what explains a difference."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from same_answers_engine import Answer, Ids

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from hf_reference import reference_model
from tessera.model.source import ModelSource

FLOAT32_TIE = 1e-3
"""Two float32 computations may order logits differently that lie closer than this."""
BFLOAT16_SPACINGS = 6
"""bfloat16 holds 8 bits, so neighbours near a logit x lie 2 ** (floor(log2 |x|) - 7) apart: one spacing. A logit that
is rounded is off by half of one; and whether it is or not, the vector behind it was rounded some ten times in each
layer. On the default model the distance of the best token's logit from the three after it, in bfloat16, was off by 0.45
spacings in the median, 0.84 root mean square, 2.7 at the 99th hundredth and 5.9 at most (4,515 distances, transformers
on a CPU against float32). Two computations in bfloat16 may thus order logits differently that lie up to 6 spacings
apart; what lies further apart is a difference that rounding does not explain."""


@dataclass(frozen=True)
class Divergence:
    """Where two answers to one prompt part."""

    request: int
    prompt_tokens: int
    at: int
    """Number of the first token that differs; those before it are equal."""
    tokens: tuple[int | None, int | None]
    """None where an answer has ended."""
    gap: float | None
    """Between the two tokens' logits in float32, after what both answers share; None where one has ended."""
    bound: float | None
    """Largest gap that rounding explains."""

    @property
    def explained(self) -> bool:
        """Whether rounding explains that they part."""
        return self.gap is not None and self.bound is not None and self.gap <= self.bound

    def line(self, names: tuple[str, str]) -> str:
        """In words."""
        first, second = ("no token" if token is None else str(token) for token in self.tokens)
        where = f"request {self.request} ({self.prompt_tokens} prompt tokens), token {self.at}"
        said = f"{where}: {first} {names[0]}, {second} {names[1]}"
        if self.gap is None or self.bound is None:
            return f"- {said}: NOT EXPLAINED, one has ended"
        verdict = "explained" if self.explained else "NOT EXPLAINED"
        return f"- {said}: float32 logits {self.gap:.3g} apart, bound {self.bound:.3g}: {verdict}"


def first_difference(one: list[int], other: list[int]) -> int:
    """The number of tokens before the first that differs; of the shorter where it is the beginning of the longer."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Reference:
    """transformers' own model on the weights of a GGUF file, without accelerate.

    weights  what weights are rounded to
    compute  what is computed in: float32 over weights rounded to bfloat16 is what an engine in bfloat16 approximates
    """

    def __init__(self, source: ModelSource, weights: str, compute: str, device: torch.device) -> None:
        model = reference_model(source, getattr(torch, weights))
        if compute != weights:
            model = model.to(getattr(torch, compute))  # its rope is float32 in either case
        self._model, self._device = model.to(device), device

    @torch.inference_mode()
    def greedy(self, groups: list[Ids], num_tokens: int) -> list[Answer]:
        """Continue prompts by `generate`; those of a group are of one length and run as a batch, without padding."""
        answers = []
        for prompts in groups:
            ids = torch.tensor(prompts, device=self._device)
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
            answers += [Answer(tokens, "length") for tokens in out[:, ids.shape[1] :].tolist()]
        return answers

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[vocab] float32: of the token after these."""
        ids = torch.tensor([tokens], device=self._device)
        last: torch.Tensor = self._model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return last.float().cpu()

    def divergences(
        self, prompts: Ids, pairs: list[tuple[Answer, Answer]], *, in_float32: bool
    ) -> tuple[list[Divergence], int]:
        """Every pair of answers that parts, with what this reference, in float32, says of its two tokens; and the
        number of tokens before answers part.
        """
        found, same = [], 0
        for number, (prompt, (one, other)) in enumerate(zip(prompts, pairs, strict=True)):
            at = first_difference(one.tokens, other.tokens)
            same += at
            if one != other:
                found.append(self._divergence(number, prompt, at, (one.tokens, other.tokens), in_float32))
        return found, same

    def _divergence(
        self, number: int, prompt: list[int], at: int, said: tuple[list[int], list[int]], in_float32: bool
    ) -> Divergence:
        first, second = (tokens[at] if at < len(tokens) else None for tokens in said)
        if first is None or second is None:
            return Divergence(number, len(prompt), at, (first, second), None, None)
        logits = self.logits(prompt + said[0][:at])
        pair = float(logits[first]), float(logits[second])
        bound = FLOAT32_TIE if in_float32 else BFLOAT16_SPACINGS * bfloat16_spacing(max(map(abs, pair)))
        return Divergence(number, len(prompt), at, (first, second), abs(pair[0] - pair[1]), bound)


def bfloat16_spacing(value: float) -> float:
    """How far apart bfloat16 numbers near `value` lie."""
    return 2.0 ** (math.floor(math.log2(max(abs(value), 2.0**-126))) - 7)
