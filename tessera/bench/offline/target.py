"""The model that is measured, as far as it is known before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tessera.config import EngineConfig
from tessera.model.registry import load_spec
from tessera.model.source import ModelSource, find_model
from tessera.model.spec import ModelSpec
from tessera.runner.device import choose_device, choose_dtype, dtype_name


@dataclass(frozen=True)
class Target:
    """Which model, in which type, on which device."""

    source: ModelSource
    spec: ModelSpec
    device: str
    """`cpu` or `cuda`."""
    torch_dtype: torch.dtype

    @property
    def name(self) -> str:
        """The model's."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """As in `float32`."""
        return dtype_name(self.torch_dtype)


def target_of(config: EngineConfig) -> Target:
    """What a config means here; ModelError or ConfigError where that is nothing."""
    source = find_model(config.model)
    spec, device = load_spec(source), choose_device(config.device.device)
    return Target(source, spec, device.type, choose_dtype(config.model.dtype, spec.dtype, device))
