"""How far one model's answers are from another's, and whether a difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tessera.bench.quality.model import Answer
from tessera.bench.statistics import mcnemar, paired_difference


def compare(led: Answer, free: Answer, reference: Answer) -> dict[str, float]:
    """KL(reference || other) of each next token in nats, largest error of a logit, and shares of equal tokens."""
    pairs = list(zip(reference.logits, led.logits))
    divergences = torch.stack([_divergence(*pair) for pair in pairs])
    agreed = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
    equal = free.tokens == reference.tokens
    return {
        "kl_mean": float(divergences.mean()),
        "kl_max": float(divergences.amax()),
        "max_logit_error": max(float((a - b).abs().amax()) for a, b in pairs),
        "greedy_agreement_led": float(agreed.double().mean()),
        "greedy_agreement_free": float(equal.double().mean()),
        "equal_answers": float(equal.all(1).double().mean()),
    }


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    """[prompts] nats; rounding may leave a little less than none, which is none."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def perplexity(losses: Tensor, reference: Tensor) -> dict[str, float]:
    """Of [windows, tokens] losses in nats, and a paired t-test over windows against the reference's on the same text.

    Windows are the samples, not tokens, whose errors within a window depend on one another. Without two windows there
    is no test.
    """
    of_window, of_reference = losses.mean(1).tolist(), reference.mean(1).tolist()
    found = {
        "perplexity": math.exp(float(losses.mean())),
        "perplexity_reference": math.exp(float(reference.mean())),
        "nll_mean": float(losses.mean()),
        "nll_difference": float(losses.mean() - reference.mean()),
    }
    if len(of_window) < 2:
        return found
    stderr = float(np.std(of_window, ddof=1)) / math.sqrt(len(of_window))
    return found | {"nll_stderr": stderr, "nll_p_value": paired_p_value(of_window, of_reference)}


def paired_p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The chance of a difference as large as this between paired scores if there is none; 1 where all are equal.

    Scores that are all 0 or 1: McNemar's exact test, binomial over the pairs that differ. Others: paired t-test.
    """
    if {*ours, *theirs} <= {0.0, 1.0}:
        pairs = list(zip(ours, theirs))
        return mcnemar(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))
    return paired_difference(ours, theirs)[1]
