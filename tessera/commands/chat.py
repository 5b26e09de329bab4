"""Talk with a model in the terminal.

/exit or Ctrl-D ends the conversation, /clear forgets it, Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from typing import TYPE_CHECKING

from tessera.commands.flags import Parser, add_model, add_sampling, engine_config, sampling
from tessera.commands.interrupts import raise_on_interrupt
from tessera.errors import RequestError
from tessera.types import SamplingParams

if TYPE_CHECKING:
    from tessera.commands.local import LocalModel


DEFAULTS = {"max_tokens": None, "temperature": 0.6, "top_p": 0.9}
"""Of the sampling: small models lose the thread at temperature 1."""


def add_flags(parser: Parser) -> None:
    """The system message, sampling and engine settings."""
    parser.add_argument("--system", metavar="TEXT", help="System message.")
    add_sampling(parser)
    add_model(parser)
    parser.epilog = "Unless given, --max-tokens is what the context leaves, --temperature 0.6 and --top-p 0.9."


def run(args: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    config, params = engine_config(args), sampling(args, **DEFAULTS)
    if params.n != 1:
        raise RequestError(f"a chat has one answer a turn, n is {params.n}", "leave --n out", param="n")
    from tessera.commands.local import LocalModel

    model = LocalModel(config, chats=True)
    raise_on_interrupt()  # which ends an answer, not the process
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    sys.stderr.write(f"{model.engine.info.model}. /exit or Ctrl-D ends, /clear forgets, Ctrl-C stops an answer.\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- arrow keys and history in input()
    converse(model, system, params)
    return 0


def converse(model: LocalModel, system: list[dict[str, str]], params: SamplingParams) -> None:
    """Read turns and answer them until /exit or the end of the input."""
    messages = list(system)
    while (line := _read_line()) is not None:
        if line == "/exit":
            return
        if line == "/clear":
            messages = list(system)
            continue
        if not line:
            continue
        if re.fullmatch(r"/\w[\w-]*", line):
            sys.stderr.write(f"{line} is no command: /exit ends, /clear forgets\n")
            continue
        turn = {"role": "user", "content": line}
        try:
            reply = answer(model, [*messages, turn], params)
        except RequestError as error:
            sys.stderr.write(f"error: {error}\n\n/clear forgets the conversation so far\n")
            continue
        messages += [turn, {"role": "assistant", "content": reply}]


def answer(model: LocalModel, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream the next turn to standard output and return it; Ctrl-C ends it early."""
    from tessera.commands.local import interrupt_as_flag

    text = model.text_of(model.chat_prompt(messages), params, add_special_tokens=False)
    parts: list[str] = []
    with interrupt_as_flag() as stopped:
        for _, delta in model.generate([text], stopped):
            parts.append(delta.text)
            sys.stdout.write(delta.text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(parts)


def _read_line() -> str | None:
    """The next line, empty after Ctrl-C; None at the end of the input. RequestError for what is not UTF-8."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is no text: {error}", "encode it as UTF-8") from None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return ""
