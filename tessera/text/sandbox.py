"""A Jinja environment for templates out of untrusted model files.

Jinja's own sandbox keeps a template away from Python's internals. It does not keep it from running for ever or
filling the memory, so here loop turns, calls and written characters are counted, time is limited, and no value may
grow past a bound.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import wraps
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 2**24
"""Written in one rendering, and in any value on the way."""
MAX_TURNS = 200_000
"""Loop turns and calls in one rendering."""
MAX_SECONDS = 5.0

_LONG_NUMBER = re.compile(r"\d{6}|\*")


class TemplateLimitError(TemplateError):
    """A template that would run too long or grow too large."""


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering: what chat templates may use, and a budget that is spent once.

    TemplateLimitError, in the middle of a rendering, when the budget is spent.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        self.filters = {name: self._guarded(function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _to_json, "_turns": self._turns, "_written": self._written, "_bounded": _joined}
        self.globals = {
            "range": range,
            "dict": lambda **items: dict(items),
            "namespace": Names,
            "raise_exception": _raise_exception,
            "strftime_now": lambda layout: datetime.now().strftime(layout),
        }
        self._turns_left = MAX_TURNS
        self._characters_left = MAX_CHARACTERS
        self._deadline = time.monotonic() + MAX_SECONDS

    def compile_bounded(self, source: str) -> CodeType:
        """Code of a template whose loops, joins and output ask for the budget of the sandbox that runs it."""
        tree = self.parse(source)
        _bound_nodes(tree)
        return self.compile(tree)

    def run(self, code: CodeType, variables: dict[str, Any]) -> str:
        """The text that the compiled template writes."""
        return Template.from_code(self, code, self.make_globals(None)).render(variables)

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call for the template; refused where the answer would be too large."""
        self._spend(1)
        if called is range and len(range(*args)) > MAX_TURNS:
            raise TemplateLimitError(f"a range of {len(range(*args))}, at most {MAX_TURNS} turns are allowed")
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str):
            _check_text_call(owner, called.__name__, [*args, *kwargs.values()])
        return _bounded(super().call(context, called, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result can be far larger than what it is given."""
        self._spend(1)
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(times, int) and _length(items) * times > MAX_CHARACTERS:
                    raise TemplateLimitError(f"a value repeated {times} times")
        if operator == "**" and isinstance(right, int) and right > 64:
            raise TemplateLimitError(f"a power of {right}")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's safe `str.format`, refused where the width could fill the memory."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_text_call(value.__self__, "format", [*args, *kwargs.values()])
            return str(formatted(*args, **kwargs))

        return checked

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._spend(1)
            text = next((arg for arg in args if isinstance(arg, str)), "")
            _check_text_call(text, function.__name__, [*args, *kwargs.values()])
            return _bounded(function(*args, **kwargs))

        return guarded

    @pass_context  # what has a context is never folded into a constant
    def _turns(self, _: Context, items: Iterable[Any]) -> list[Any]:
        listed = list(items)
        self._spend(len(listed))
        return listed

    @pass_context
    def _written(self, _: Context, value: Any) -> str:
        text = str(value)
        self._characters_left -= len(text)
        if self._characters_left < 0:
            raise TemplateLimitError(f"more than {MAX_CHARACTERS} characters written")
        return text

    def _spend(self, turns: int) -> None:
        self._turns_left -= turns
        if self._turns_left < 0:
            raise TemplateLimitError(f"more than {MAX_TURNS} loop turns and calls")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it took more than {MAX_SECONDS:g} seconds")


class GenerationTag(Extension):
    """`{% generation %}`, which marks what training counts: here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Names(Namespace):
    """Jinja's `namespace()`, without the attributes that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *others = args
        values = dict(*others, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}")


def _bound_nodes(tree: nodes.Template) -> None:
    """Send what loops run over, what `~` joins and what is written through the counting filters."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _filtered(loop.iter, "_turns")
    for output in list(tree.find_all(nodes.Output)):
        output.nodes = [_filtered(node, "_written") for node in output.nodes]
    for parent in list(tree.find_all(nodes.Node)):
        for name, value in list(parent.iter_fields()):
            if isinstance(value, nodes.Concat):
                setattr(parent, name, _filtered(value, "_bounded"))
            elif isinstance(value, list):
                value[:] = [_filtered(item, "_bounded") if isinstance(item, nodes.Concat) else item for item in value]


def _filtered(node: Any, name: str) -> nodes.Filter:
    if isinstance(node, nodes.TemplateData):
        node = nodes.Const(node.data, lineno=node.lineno, environment=node.environment)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _joined(value: Any) -> Any:
    return _bounded(value)


def _bounded(value: Any) -> Any:
    if _length(value) > MAX_CHARACTERS or (isinstance(value, int) and value.bit_length() > 4096):
        raise TemplateLimitError(f"a value grew past {MAX_CHARACTERS} characters or items")
    return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _check_text_call(text: str, name: str, args: list[Any]) -> None:
    """Refuse, before it is done, a text operation whose result would be huge."""
    if any(isinstance(arg, int) and abs(arg) > MAX_CHARACTERS for arg in args):
        raise TemplateLimitError(f"{name} with a number above {MAX_CHARACTERS}")
    if "format" in name:
        _check_format(text)
    if "replace" in name and (len(text) + 1) * max(len(arg) for arg in [*args, ""] if isinstance(arg, str)) > 2**28:
        raise TemplateLimitError("a replacement that could fill the memory")
    if "join" in name:
        parts = [part for arg in args if isinstance(arg, list | tuple) for part in arg]
        if sum(_length(part) + len(text) for part in parts) > MAX_CHARACTERS:
            raise TemplateLimitError(f"{name} of more than {MAX_CHARACTERS} characters")


def _check_format(layout: str) -> None:
    if _LONG_NUMBER.search(layout):
        raise TemplateLimitError("a format with a width of more than five digits or *")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: characters as they are, nothing escaped for HTML."""
    if isinstance(indent, str) or (indent is not None and not 0 <= indent <= 16):
        raise TemplateLimitError(f"tojson with indent {indent!r:.20}, 0 to 16 is taken")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
