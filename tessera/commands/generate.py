"""Continue prompts, or answer them, on standard output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from tessera.commands.flags import Parser, add_model, add_sampling, engine_config, sampling
from tessera.config import ModelConfig
from tessera.errors import ConfigError, RequestError
from tessera.types import SamplingParams

if TYPE_CHECKING:
    from tessera.commands.local import LocalModel
    from tessera.text.request_text import RequestText, TextDelta

NUM_DEFAULT_TOKENS = 256


def add_flags(parser: Parser) -> None:
    """Prompts, output form, sampling and engine settings."""
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="What to continue; may be repeated. Left out: standard input."
    )
    parser.add_argument("--chat", action="store_true", help="Take each prompt as a user's turn and answer it.")
    parser.add_argument("--system", metavar="TEXT", help="System message, with --chat.")
    parser.add_argument("--json", action="store_true", help="One JSON object a prompt, when all are finished.")
    add_sampling(parser)
    add_model(parser)
    parser.epilog = f"--max-tokens is {NUM_DEFAULT_TOKENS} here unless it is given."


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    config, params = engine_config(args), sampling(args, max_tokens=NUM_DEFAULT_TOKENS)
    _check(args, params)
    prompts = args.prompt or [_standard_input(config.model)]
    from tessera.commands.local import LocalModel, interrupt_as_flag

    model = LocalModel(config, chats=args.chat)
    texts = [_text(model, prompt, params, args) for prompt in prompts]
    with interrupt_as_flag() as stopped:
        deltas = model.generate(texts, stopped)
        if args.json:
            _print_json(texts, deltas)
        else:
            _print_in_order([(text, i) for text in texts for i in range(params.n)], deltas)
        return 130 if stopped() else 0


def _check(args: argparse.Namespace, params: SamplingParams) -> None:
    word = args.model_word
    if word is not None and any(map(str.isspace, word)) and not os.path.exists(os.path.expanduser(word)):
        raise ConfigError(
            f"{word!r:.80} names no model, for which a bare word is taken", "give a text with --prompt TEXT"
        )
    if args.system is not None and not args.chat:
        raise RequestError("--system is part of a chat", "add --chat")
    if not args.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise RequestError("logprobs are printed with --json only", "add --json")


def _standard_input(config: ModelConfig) -> str:
    """All of it, once the model is known to exist: whoever writes `generate hi` is not asked for a text first."""
    from tessera.model.source import find_model

    find_model(config)
    if sys.stdin.isatty():
        sys.stderr.write("the prompt, then Ctrl-D:\n")
    try:
        prompt = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is no text: {error}", "encode it as UTF-8") from None
    if not prompt:
        raise RequestError("standard input is empty", "give --prompt TEXT")
    return prompt


def _text(model: LocalModel, prompt: str, params: SamplingParams, args: argparse.Namespace) -> RequestText:
    if not args.chat:
        return model.text_of(prompt, params, add_special_tokens=True)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = [*system, {"role": "user", "content": prompt}]
    return model.text_of(model.chat_prompt(messages), params, add_special_tokens=False)


def _print_json(texts: list[RequestText], deltas: Iterable[tuple[RequestText, TextDelta]]) -> None:
    from tqdm import tqdm

    with tqdm(total=len(texts), desc="prompts", unit="prompt", disable=not sys.stderr.isatty()) as bar:
        for text, _ in deltas:
            if text.finished:
                bar.update()
    for text in texts:
        sys.stdout.write(msgspec.json.encode(text.result()).decode() + "\n")


def _print_in_order(places: list[tuple[RequestText, int]], deltas: Iterable[tuple[RequestText, TextDelta]]) -> None:
    """The first text as it comes, the others behind it as soon as it is their turn, a line break after each."""
    waiting = {(id(text), i): "" for text, i in places}
    finished: set[tuple[int, int]] = set()
    queue = list(waiting)
    for text, delta in deltas:
        key = (id(text), delta.index)
        waiting[key] += delta.text
        if delta.finish_reason:
            finished.add(key)
        while queue:
            sys.stdout.write(waiting[queue[0]])
            waiting[queue[0]] = ""
            if queue[0] not in finished:
                break
            sys.stdout.write("\n")
            queue.pop(0)
        sys.stdout.flush()
