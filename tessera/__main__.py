"""The process of the command `tessera`, and `python -m tessera`."""

from __future__ import annotations

import sys

from tessera.commands.interrupts import end_on_interrupt


def main() -> int:
    """Run the command of this process's arguments; its exit code."""
    end_on_interrupt()
    from tessera.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
