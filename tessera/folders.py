"""Where tessera keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, then tessera. OSError: nowhere."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without a home, as in some containers
        raise OSError("there is no home folder, and XDG_CACHE_HOME is not set") from error
    return folder / "tessera"
