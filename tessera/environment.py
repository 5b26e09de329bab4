"""The environment variables that tessera reads; any other that bears its name is refused."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from tessera.errors import ConfigError

ENVIRONMENT_NAMES = ("TESSERA_API_KEY",)
"""The environment variables tessera reads; any other that starts with TESSERA_ is refused."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for a variable that starts with TESSERA_ and means nothing: its writer meant this program."""
    for name in environment:
        if name.startswith("TESSERA_") and name not in ENVIRONMENT_NAMES:
            near = difflib.get_close_matches(name, ENVIRONMENT_NAMES, n=1, cutoff=0.8)
            raise ConfigError(
                f"environment variable {name} has no effect; tessera reads {', '.join(ENVIRONMENT_NAMES)} only",
                f"did you mean {near[0]}?" if near else f"unset {name}; settings are flags, see `tessera serve --help`",
            )
