"""Random weights for benchmarks: nothing is read, the numbers stay finite, the same seed gives the same model."""

from __future__ import annotations

import torch

from tessera.model.language_model import LanguageModel

STANDARD_DEVIATION = 0.02
"""Small enough that activations stay finite in float16 through any number of normalised layers."""


def fill_randomly(model: LanguageModel, seed: int) -> None:
    """Draw every matrix from a normal distribution on the model's own device; norms become 1, biases 0."""
    generator: torch.Generator | None = None
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        parameter.normal_(0, STANDARD_DEVIATION, generator=generator)
