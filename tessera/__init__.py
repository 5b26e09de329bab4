"""tessera: an LLM inference and serving engine whose attention is pluggable, proven and measured."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

# OpenMP reads this once, when torch is first imported. Threads that spin while they wait for one another
# make a step take ten times as long as soon as anything else runs on the same cores (docs/LOG.md), and
# beside a server something always does. A value that the user has set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from tessera.engine.llm import LLM
    from tessera.types import SamplingParams


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used, so that `tessera --help` does not load torch."""
    if name == "LLM":
        from tessera.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tessera.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'tessera' has no attribute {name!r}")
