"""Serve the default model, ask it three questions at once, and show what that cost.

Starts `tessera serve` as a real process, streams three answers through the `openai` client side by side,
prints a table of speed, attention backends and pages, and stops the server. Exit code 0 only if every
answer finished, the one about France names Paris, and every page of the cache was given back.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai

QUESTIONS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write one sentence about the sea.",
)
MAX_TOKENS = 96
TERMINAL = sys.stdout.isatty()


@dataclass
class Answer:
    """One question, and its answer so far."""

    question: str
    text: str = ""
    num_tokens: int = 0
    finish_reason: str | None = None
    asked: float = 0.0
    first: float = 0.0
    last: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token."""
        return (self.num_tokens - 1) / max(self.last - self.first, 1e-9)


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server that ends with this block."""
    command = [sys.executable, "-m", "tessera.cli", "serve", "--port", "0"]
    print("$ tessera serve --port 0", flush=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield wait_for_address(server)
        finally:
            server.terminate()
            assert server.stderr is not None
            server.stderr.read()


def wait_for_address(server: subprocess.Popen[str]) -> str:
    """Show what the server logs until it says where it listens."""
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", flush=True)
        if found := re.search(r"(http://\S+)/v1", line):
            return found[1]
    raise SystemExit(server.wait() or 1)


def get(url: str) -> Any:
    """A JSON document."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        return json.load(reply)


async def ask(client: openai.AsyncOpenAI, model: str, answer: Answer) -> None:
    """Stream one answer into `answer`."""
    answer.asked = time.monotonic()
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": answer.question}],
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if chunk.usage:
            answer.num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if choice.delta.content:
                answer.last = time.monotonic()
                answer.first = answer.first or answer.last
                answer.text += choice.delta.content
            answer.finish_reason = choice.finish_reason or answer.finish_reason


async def ask_all(url: str, answers: list[Answer]) -> None:
    """Ask everything at once and show the answers as they grow."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        asking = asyncio.gather(*(ask(client, model, answer) for answer in answers))
        screen = Screen(answers)
        while not asking.done():
            screen.show()
            await asyncio.sleep(0.1)
        screen.show(final=True)
        await asking


class Screen:
    """Shows several growing texts: redrawn in place on a terminal, whole lines as they come elsewhere."""

    def __init__(self, answers: list[Answer]) -> None:
        self._answers = answers
        self._drawn: list[str] = []
        self._num_printed = [0] * len(answers)
        for i, answer in enumerate(answers):
            print(f"[{i + 1}] {answer.question}", flush=True)
        print()

    def show(self, *, final: bool = False) -> None:
        """Bring the screen up to date; `final` gives out the last, unfinished lines too."""
        lines = [self._lines(i, answer) for i, answer in enumerate(self._answers)]
        if TERMINAL:
            self._redraw(lines, final)
            return
        for i, (answer, mine) in enumerate(zip(self._answers, lines)):
            complete = mine if final or answer.finish_reason else mine[:-1]
            for line in complete[self._num_printed[i] :]:
                print(line, flush=True)
            self._num_printed[i] = max(self._num_printed[i], len(complete))

    def _lines(self, i: int, answer: Answer) -> list[str]:
        width = min(shutil.get_terminal_size().columns, 100) - 5
        wrapped = [part for line in answer.text.splitlines() for part in textwrap.wrap(line, width) or [""]]
        return [f"[{i + 1}] {part}" for part in wrapped]

    def _redraw(self, lines: list[list[str]], final: bool) -> None:
        room = (shutil.get_terminal_size().lines - 2) // len(lines)
        shown = [line for mine in lines for line in (mine if final else mine[-room:])]
        if shown == self._drawn:
            return
        up = f"\x1b[{len(self._drawn)}A" if self._drawn else ""
        print(f"{up}\r\x1b[J" + "".join(f"{line}\n" for line in shown), end="", flush=True)
        self._drawn = shown


def report(answers: list[Answer], url: str, free_before: int) -> list[str]:
    """Print what it cost; returns what went wrong, in sentences."""
    print(f"\n{'answer':8}{'first token':>13}{'tokens':>8}{'tokens/s':>10}  ended by")
    for i, answer in enumerate(answers):
        first = f"{(answer.first - answer.asked) * 1000:.0f} ms"
        print(f"[{i + 1}]{first:>18}{answer.num_tokens:>8}{answer.tokens_per_second:>10.1f}  {answer.finish_reason}")
    print()
    for phase, choice in get(f"{url}/v1/attention")["phases"].items():
        print(f"{phase + ' attention':20}{choice['backend']} ({choice['reason']})")
    status = wait_until_idle(url)
    total, free = status["pages_total"], status["pages_free"]
    print(f"{'pages':20}{status['pages_used_peak']} of {total} at the peak, {free_before - free} not returned")
    problems = [f"answer {i + 1} did not finish" for i, a in enumerate(answers) if not a.text or not a.finish_reason]
    if "Paris" not in answers[0].text:
        problems.append("the capital of France was not named")
    if free != free_before:
        problems.append(f"{free_before - free} pages were not returned")
    return problems


def wait_until_idle(url: str) -> dict[str, int]:
    """The engine's counters once nothing runs, or after 5 s."""
    deadline = time.monotonic() + 5
    while True:
        status: dict[str, int] = get(f"{url}/v1/status")["status"]
        if status["running"] + status["waiting"] == 0 or time.monotonic() > deadline:
            return status
        time.sleep(0.1)


def main() -> int:
    """Run the demo; the exit code says whether it worked."""
    begun = time.monotonic()
    answers = [Answer(question) for question in QUESTIONS]
    with serving() as url:
        free_before = wait_until_idle(url)["pages_free"]
        asyncio.run(ask_all(url, answers))
        problems = report(answers, url, free_before)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print(f"\n{'failed' if problems else 'all well'} after {time.monotonic() - begun:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
