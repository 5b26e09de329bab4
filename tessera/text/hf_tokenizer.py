"""A tokenizer out of a Hugging Face folder: tokenizer.json and the files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from tessera.errors import ModelError
from tessera.text.parts import TokenizerParts

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_HINT = "give another tokenizer with --tokenizer FOLDER"
_LONGEST = 300
"""Characters quoted of an error that is not ours."""


def folder_parts(path: Path) -> TokenizerParts:
    """The tokenizer and chat template in a folder, or in a tokenizer.json and the files beside it.

    tokenizer.json alone decides which tokens go around a text, as in transformers 5, whatever add_bos_token says. A
    folder without tokenizer.json is read by transformers. ModelError where there is none, or a damaged one.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    settings = _read_json(file.parent / "tokenizer_config.json")
    special = _special_tokens(settings, _read_json(file.parent / "special_tokens_map.json"))
    backend = _read_backend(file) if file.exists() else _through_transformers(path)
    _add_tokens(backend, settings, special)
    return TokenizerParts(
        backend=backend,
        special_tokens=special,
        end_token_ids=_end_token_ids(backend, special, _read_json(file.parent / "generation_config.json")),
        template=_template(file.parent, settings),
    )


def _read_backend(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises plain Exception
        raise ModelError(f"{file} is not a tokenizer that can be read: {error}", _HINT) from None


def _through_transformers(folder: Path) -> Tokenizer:
    from transformers import AutoTokenizer  # costs a second and more: only for models of older formats

    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"{folder} holds no tokenizer.json, and transformers finds no tokenizer: {_first_sentence(error)}", _HINT
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"{folder} holds a {type(loaded).__name__}, which has no fast form", _HINT)
    return backend


def _first_sentence(error: Exception) -> str:
    """Of a message, whose sentences may go over several lines: a whole one without its full stop, or its beginning."""
    text = " ".join(str(error).split())
    first = re.split(r"(?<=[.!?]) (?=[A-Z])", text, maxsplit=1)[0].rstrip(" .:")
    return f"{first[:_LONGEST]}..." if len(first) > _LONGEST else first or type(error).__name__


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}", "download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} must hold an object, not {value!r:.40}", "download the model again")
    return value


def _special_tokens(*sources: dict[str, Any]) -> dict[str, str]:
    """Name -> text; a source may give the text or an object around it, and the first source wins."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _NAMES:
            value = source.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found.setdefault(name, text)
    return found


def _add_tokens(backend: Tokenizer, settings: dict[str, Any], special: dict[str, str]) -> None:
    """Make known what tokenizer_config.json declares and tokenizer.json lacks; no id past the vocabulary is made."""
    known = backend.get_added_tokens_decoder()
    declared = settings.get("added_tokens_decoder")
    for key, entry in sorted((declared if isinstance(declared, dict) else {}).items()):
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and key.isdigit():
            flags = {
                name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
            }
            if int(key) not in known and backend.token_to_id(entry["content"]) in (int(key), None):
                backend.add_tokens([AddedToken(entry["content"], **flags)])
    missing = [text for text in special.values() if backend.token_to_id(text) is not None]
    backend.add_special_tokens([text for text in missing if backend.token_to_id(text) not in known])


def _end_token_ids(backend: Tokenizer, special: dict[str, str], generation: dict[str, Any]) -> tuple[int, ...]:
    first = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    more = generation.get("eos_token_id")
    listed = [first, *(more if isinstance(more, list) else [more])]
    return tuple(dict.fromkeys(i for i in listed if isinstance(i, int) and not isinstance(i, bool)))


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: a file of its own, else in tokenizer_config.json, one text or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read: {error}", "give another one with --chat-template") from None
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
