"""Text to token ids and back, and conversations to text, for one model.

Reading a tokenizer.json or a GGUF file imports neither torch nor transformers, whose import costs seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tessera.config import ModelConfig
from tessera.errors import ConfigError, RequestError
from tessera.model.gguf_file import GGUFFile
from tessera.model.source import ModelSource
from tessera.text.chat_template import ChatTemplate
from tessera.text.gguf_tokenizer import gguf_parts
from tessera.text.hf_tokenizer import folder_parts
from tessera.text.parts import TokenizerParts
from tessera.text.pieces import Pieces, PieceTable


class Tokenizer:
    """One model's tokenizer and chat template."""

    def __init__(self, parts: TokenizerParts, template: ChatTemplate | None = None) -> None:
        self.backend = parts.backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.pieces = Pieces(self.backend)
        self.special_tokens = parts.special_tokens
        self.special_token_ids = frozenset(
            token_id for token_id, token in self.backend.get_added_tokens_decoder().items() if token.special
        )
        self._shown_pieces = PieceTable(self.pieces.table.__getitem__, self.special_token_ids)
        self.end_token_ids = parts.end_token_ids
        self.vocab_size = parts.vocab_size or self.backend.get_vocab_size(with_added_tokens=True)
        self.template = template or (ChatTemplate(parts.template) if parts.template is not None else None)

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token."""
        return self._special_id("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token."""
        return self._special_id("bos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; a special token that is spelt out in it counts as that token, as with Hugging Face.

        `add_special_tokens` puts the tokens before and after that the model was trained with. RequestError for text
        with half of a surrogate pair, which no UTF-8 can hold.
        """
        _check_whole_characters(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD, ids that no token has nothing."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, its leading space included; part of a character, perhaps."""
        return self.pieces.table[token_id]

    def piece_table(self, *, skip_special_tokens: bool) -> PieceTable:
        """Token id -> `token_bytes`, nothing for special tokens where they are skipped."""
        return self._shown_pieces if skip_special_tokens else self.pieces.table

    def token_text(self, token_id: int) -> str:
        """One token as text; special tokens too, and U+FFFD where it is only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The prompt that the model's chat template makes of a conversation.

        It begins with the model's first token where there is one: encode it with `add_special_tokens=False`.
        RequestError where the model has no template, or the template refuses the messages.
        """
        if self.template is None:
            raise RequestError(
                "the model has no chat template, so it cannot be asked with messages",
                "start with --chat-template FILE, or send a prompt to /v1/completions",
                param="messages",
            )
        return self.template.render(messages, self.special_tokens, add_generation_prompt=add_generation_prompt)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        found: int | None = None if text is None else self.backend.token_to_id(text)
        return found


def _check_whole_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds half of a surrogate pair at character {error.start}",
            "send whole characters; in JSON such a character takes two \\u escapes",
            param="prompt",
        ) from None


def load_tokenizer(source: ModelSource, config: ModelConfig, *, computes: bool = True) -> Tokenizer:
    """The tokenizer of a model, or the one that `config.tokenizer` names, with `config.chat_template` if given.

    ConfigError where a named file does not exist; ModelError where the model brings no tokenizer or a damaged one.
    Where only transformers could read it, which takes seconds, ModelError for a model that cannot be loaded either:
    its config or its missing weights are then what the user must mend. `computes=False` where nobody will load it.
    """
    template = _read_template(Path(config.chat_template)) if config.chat_template is not None else None
    path = source.path if config.tokenizer is None else Path(config.tokenizer)
    if not path.exists():
        raise ConfigError(
            f"no tokenizer at {path}", "--tokenizer takes a folder, a tokenizer.json or a .gguf file that exists"
        )
    if computes and path.is_dir() and not (path / "tokenizer.json").exists():
        from tessera.model.registry import check_model  # imports torch, as transformers does

        check_model(source, load_format=config.load_format)
    return Tokenizer(_read_parts(path), template)


def _read_parts(path: Path) -> TokenizerParts:
    return gguf_parts(GGUFFile(path).metadata, path) if path.suffix == ".gguf" else folder_parts(path)


def _read_template(path: Path) -> ChatTemplate:
    try:
        return ChatTemplate(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {path} cannot be read: {error}", "check --chat-template") from None
