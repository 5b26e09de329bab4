"""One logger, to stderr: stdout is for data."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("tessera")
LEVELS = ("debug", "info", "warning", "error")


def set_up(level: str = "info") -> None:
    """Send records of `level` and above to stderr, one line each; calling it twice changes only the level."""
    logger.setLevel(level.upper())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
