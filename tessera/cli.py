"""The command `tessera`: parses, dispatches, and turns every refusal into a sentence and a hint.

Commands import what they need when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tessera import __version__, log
from tessera.commands import backends, chat, generate, serve, tune, verify
from tessera.commands.bench import command as bench
from tessera.commands.flags import Parser
from tessera.commands.interrupts import EXIT_CODE, raise_on_interrupt
from tessera.environment import check_environment
from tessera.errors import ConfigError, TesseraError

INTERRUPTIBLE = ("serve", "tune", "bench")
"""Commands that end what they began when they are interrupted, also while they start."""
COMMANDS = {
    "serve": serve,
    "generate": generate,
    "chat": chat,
    "backends": backends,
    "verify": verify,
    "tune": tune,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 2 for a wrong flag or setting, 1 for another refusal."""
    try:
        check_environment()
        return _run(sys.argv[1:] if argv is None else list(argv))
    except TesseraError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return EXIT_CODE
    except BrokenPipeError:  # the reader of our output has gone: nothing more to say to it
        sys.stdout = None
        return 0


def _run(argv: list[str]) -> int:
    parser = Parser(prog="tessera", description="LLM inference and serving with attention that is pluggable per phase.")
    parser.add_argument("--version", action="version", version=f"tessera {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands = {"version": subparsers.add_parser("version", help="Print the version.")}
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        commands[name] = subparsers.add_parser(name, help=text.splitlines()[0], description=text)
        commands[name].add_argument("--log-level", choices=log.LEVELS, default="info", help="What goes to stderr.")
        commands[name].set_defaults(parser=commands[name])
        module.add_flags(commands[name])
    args, extra = parser.parse_known_args(argv)
    parser.refuse_unknown(extra, getattr(args, "parser", parser))
    if args.command is None:
        parser.print_help()
        return 2
    if args.command == "version":
        sys.stdout.write(f"tessera {__version__}\n")
        return 0
    log.set_up(args.log_level)
    if args.command in INTERRUPTIBLE:
        raise_on_interrupt()
    code: int = COMMANDS[args.command].run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
