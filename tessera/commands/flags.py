"""Flags out of config fields: one a setting, its docstring as help, its default left to the config."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, get_type_hints

from tessera.config import EngineConfig, Setting, check_section, field_docstrings, section_types, settings_of
from tessera.errors import ConfigError, RequestError
from tessera.types import SamplingParams


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors and which never guesses at abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(message, f"see `{self.prog} --help`")

    def refuse_unknown(self, extra: list[str], command: Parser) -> None:
        """Raise ConfigError for the first of `extra`, with the nearest flag that exists."""
        if not extra:
            return
        given = next((word for word in extra if word.startswith("-")), extra[0])
        name = given.partition("=")[0]
        shown = [action for action in command._actions if action.help is not argparse.SUPPRESS]
        known = [flag for action in shown for flag in action.option_strings]
        near = difflib.get_close_matches(name, known, n=1)
        what = "unknown flag" if name.startswith("-") else "unexpected word"
        hint = f"did you mean {near[0]}?" if near and what == "unknown flag" else f"see `{command.prog} --help`"
        raise ConfigError(f"{what} {name!r}", hint)


def add_model(
    parser: Parser, *, defaults: Mapping[str, object] = MappingProxyType({}), refused: Container[str] = ()
) -> None:
    """The model as a bare word, and every engine setting as a flag; `defaults` and `refused` as for `add_settings`."""
    text = argparse.SUPPRESS if "model" in refused else "The same as --model."
    parser.add_argument("model_word", metavar="MODEL", nargs="?", help=text)
    for name, section in section_types(EngineConfig).items():
        add_settings(parser, name, settings_of(section), defaults=defaults, refused=refused)


def add_settings(
    parser: Parser,
    title: str,
    settings: Iterable[Setting],
    *,
    defaults: Mapping[str, object] = MappingProxyType({}),
    refused: Container[str] = (),
) -> None:
    """A group of flags; those left out on the command line are left out of the namespace.

    `defaults` says, by name, what the command takes for a flag that is left out where that is not the setting's own
    default. Those `refused` are understood, for the command to say why not, and not shown.
    """
    group = parser.add_argument_group(title)
    for setting in settings:
        default = defaults.get(setting.name, setting.default)
        more = "" if default is None else f" (default: {default})"
        text = setting.help.partition(" Left out:")[0] if setting.name in defaults else setting.help
        given: dict[str, Any] = {"help": (text + more).replace("%", "%%"), "default": argparse.SUPPRESS}
        if setting.name in refused:
            given["help"] = argparse.SUPPRESS
        if setting.kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        else:
            given |= {"type": setting.kind, "choices": setting.choices}
            given["metavar"] = "{" + ",".join(setting.choices) + "}" if setting.choices else _metavar(setting.kind)
        group.add_argument(setting.flag, dest=setting.name, **given)


def add_sampling(parser: Parser) -> None:
    """The fields of SamplingParams as flags; those that are lists may be given several times.

    Not the seed: the engine's own, which is a flag already, decides it.
    """
    hints, notes = get_type_hints(SamplingParams), field_docstrings(SamplingParams)
    group = parser.add_argument_group("sampling")
    for name, hint in hints.items():
        if name == "seed":
            continue
        parts = str(hint)
        given: dict[str, Any] = {"help": notes[name].replace("%", "%%"), "default": argparse.SUPPRESS}
        if hint is bool:
            given["action"] = argparse.BooleanOptionalAction
        elif name == "logit_bias":
            given |= {"action": "append", "type": _bias, "metavar": "ID=BIAS"}
        else:
            kind = next(kind for kind in (int, float, str) if kind.__name__ in parts)
            given |= {"type": kind, "metavar": _metavar(kind)} | ({"action": "append"} if "list" in parts else {})
        group.add_argument("--" + name.replace("_", "-"), dest=name, **given)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine settings given on the command line."""
    names = [s.name for section in section_types(EngineConfig).values() for s in settings_of(section)]
    given = {name: value for name, value in vars(args).items() if name in names}
    word = getattr(args, "model_word", None)
    if word is not None and given.setdefault("model", word) != word:
        raise ConfigError(f"two models are given: {word} and --model {given['model']}", "leave one of them out")
    return EngineConfig.from_flat(given)


Section = TypeVar("Section")


def read_section(args: argparse.Namespace, section: type[Section]) -> Section:
    """The settings of one section given on the command line. ConfigError on a value out of range."""
    kind: type = section
    names = [setting.name for setting in settings_of(kind)]
    read = section(**{name: getattr(args, name) for name in names if hasattr(args, name)})
    check_section(read)
    return read


def sampling(args: argparse.Namespace, **defaults: Any) -> SamplingParams:
    """The sampling given on the command line, over `defaults`. ConfigError on an impossible value."""
    fields = SamplingParams.__dataclass_fields__.keys() - {"seed"}
    given = {name: value for name, value in vars(args).items() if name in fields}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    try:
        return SamplingParams(**(defaults | given))
    except RequestError as error:
        hint = f"mend --{error.param.replace('_', '-')}" if error.param else error.hint
        raise ConfigError(error.message, hint) from None


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}[kind]


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    return int(token_id), float(bias)
