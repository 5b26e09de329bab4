"""A tokenizer out of a GGUF file's metadata, without the files it was converted from.

GGUF names the pre-tokenizer instead of holding it. Only names whose rules are known exactly are read (checked with
the golden cases of llama.cpp's vocabularies, see tests/text/test_gguf_vocabularies.py); any other is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tessera.errors import ModelError
from tessera.text.parts import TokenizerParts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)


@dataclass(frozen=True)
class _Cutter:
    """How text is cut into words before merging, and what else a `tokenizer.ggml.pre` stands for."""

    splits: Callable[[], list[Any]]
    byte_level_regex: bool = False
    """Whether GPT-2's own regex cuts what the splits leave."""
    nfc: bool = False
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""
    adds_bos: bool = False
    """Unless the file says."""


def _regexes(*patterns: str) -> Callable[[], list[Any]]:
    return lambda: [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def _digits() -> list[Any]:
    return [pre_tokenizers.Digits(individual_digits=True)]


_LLAMA3_CUTTER = _Cutter(_regexes(_LLAMA3), ignore_merges=True, adds_bos=True)
_DIGIT_CUTTER = _Cutter(_digits, byte_level_regex=True)

CUTTERS: dict[str, _Cutter] = {
    "gpt-2": _Cutter(lambda: [], byte_level_regex=True),
    "smollm": _DIGIT_CUTTER,
    "starcoder": _DIGIT_CUTTER,
    "refact": _DIGIT_CUTTER,
    "llama-bpe": _LLAMA3_CUTTER,
    "llama3": _LLAMA3_CUTTER,
    "llama-v3": _LLAMA3_CUTTER,
    "qwen2": _Cutter(_regexes(_QWEN2), nfc=True),
    "tekken": _Cutter(_regexes(_TEKKEN), ignore_merges=True, adds_bos=True),
    "deepseek-coder": _Cutter(
        lambda: [*_regexes("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")(), *_digits()], adds_bos=True
    ),
}
"""By `tokenizer.ggml.pre`."""


def gguf_parts(metadata: dict[str, Any], path: Path) -> TokenizerParts:
    """The tokenizer and chat template in a GGUF file's metadata.

    ModelError where the file holds none, a damaged one, or one whose rules are not known exactly.
    """
    vocabulary = _Vocabulary(metadata, path)
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(vocabulary.kind)
    if build is None:
        raise vocabulary.refused(f"the tokenizer {vocabulary.kind!r:.40} is not supported, only gpt2 and llama are")
    try:
        backend = build(vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise vocabulary.refused(f"its tokenizer is damaged: {error}") from None
    template = metadata.get("tokenizer.chat_template")
    return TokenizerParts(
        backend=backend,
        special_tokens={name: vocabulary.tokens[i] for name, i in vocabulary.special_ids.items()},
        end_token_ids=vocabulary.end_token_ids,
        template=template if isinstance(template, str) else None,
        vocab_size=len(vocabulary.tokens),
    )


class _Vocabulary:
    """The checked `tokenizer.ggml.*` entries of one file."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path
        self.architecture = metadata.get("general.architecture")
        self.kind = self.entry("model", str)
        self.tokens: list[str] = self.entry("tokens", list) or []
        self.types: list[int] = self.entry("token_type", list) or [NORMAL] * len(self.tokens)
        if not self.tokens or not isinstance(self.tokens[0], str):
            raise self.refused("it holds no tokenizer")
        if len(self.types) != len(self.tokens):
            raise self.refused(f"its tokenizer is damaged: {len(self.tokens)} tokens, {len(self.types)} types")
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        found = {f"{short}_token": self.token_id(f"{name}_token_id") for name, short in names.items()}
        self.special_ids = {name: i for name, i in found.items() if i is not None}

    def entry(self, name: str, kind: type) -> Any:
        """The entry `tokenizer.ggml.<name>`, or None where the file has none."""
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and not isinstance(value, kind):
            raise self.refused(f"its tokenizer.ggml.{name} is {value!r:.40}, not a {kind.__name__}")
        return value

    def token_id(self, name: str) -> int | None:
        """A token id of the metadata; ModelError when there is no such token."""
        value: int | None = self.entry(name, int)
        if value is not None and not 0 <= value < len(self.tokens):
            raise self.refused(f"its tokenizer.ggml.{name} is {value}, the vocabulary has {len(self.tokens)} tokens")
        return value

    def refused(self, reason: str) -> ModelError:
        """The error that names the file and the way out."""
        return ModelError(f"{self._path}: {reason}", "give the model's Hugging Face folder with --tokenizer")

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or a turn, the end-of-sequence token first."""
        found = [self.token_id(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id")]
        return tuple(dict.fromkeys(i for i in found if i is not None))

    def ids(self, *kinds: int) -> dict[str, int]:
        """Text -> id of the tokens of these types."""
        return {token: i for i, (token, kind) in enumerate(zip(self.tokens, self.types)) if kind in kinds}

    def add_to(self, backend: Tokenizer, *, adds_bos: bool) -> None:
        """Make control and user-defined tokens known, and put the first and last token around a text."""
        special = self.ids(CONTROL, UNKNOWN)
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.ids(USER_DEFINED)])
        bos = self._edge("bos", adds_bos)
        eos = self._edge("eos", False)
        if bos or eos:
            around = [f"{text}:0" for text, _ in bos], [f"{text}:0" for text, _ in eos]
            backend.post_processor = processors.TemplateProcessing(
                single=[*around[0], "$A:0", *around[1]], special_tokens=[*bos, *eos]
            )

    def _edge(self, name: str, default: bool) -> list[tuple[str, int]]:
        token_id = self.special_ids.get(f"{name}_token")
        asked = self.entry(f"add_{name}_token", bool)
        wanted = default if asked is None else asked
        return [(self.tokens[token_id], token_id)] if wanted and token_id is not None else []


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    cutter = _cutter(vocabulary)
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.entry("merges", list) or []]
    ids = vocabulary.ids(NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    backend = Tokenizer(models.BPE(ids, merges, ignore_merges=cutter.ignore_merges))
    if cutter.nfc:
        backend.normalizer = normalizers.NFC()
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cutter.byte_level_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cutter.splits(), last])
    backend.decoder = decoders.ByteLevel()
    vocabulary.add_to(backend, adds_bos=cutter.adds_bos)
    return backend


def _cutter(vocabulary: _Vocabulary) -> _Cutter:
    name = vocabulary.entry("pre", str) or ("gpt-2" if vocabulary.architecture == "gpt2" else None)
    if name not in CUTTERS:
        known = ", ".join(sorted(CUTTERS))
        what = f"its pre-tokenizer is {name!r:.40}" if name else "it does not name its pre-tokenizer"
        raise vocabulary.refused(f"{what}; known exactly are {known}")
    return CUTTERS[name]


def _sentence_piece(vocabulary: _Vocabulary) -> Tokenizer:
    if vocabulary.entry("remove_extra_whitespaces", bool) or vocabulary.entry("precompiled_charsmap", list):
        raise vocabulary.refused("its tokenizer changes the text before it cuts it, which is not supported")
    scores = vocabulary.entry("scores", list) or []
    if len(scores) != len(vocabulary.tokens):
        raise vocabulary.refused(f"its tokenizer is damaged: {len(vocabulary.tokens)} tokens, {len(scores)} scores")
    unknown = vocabulary.special_ids.get("unk_token")
    ids = vocabulary.ids(NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)
    unk_token = None if unknown is None else vocabulary.tokens[unknown]
    backend = Tokenizer(
        models.BPE(ids, _merges(vocabulary, scores), unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    prefix = vocabulary.entry("add_space_prefix", bool) is not False
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    vocabulary.add_to(backend, adds_bos=True)
    return backend


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece scores highest: every split of a piece, best first."""
    ids = vocabulary.ids(NORMAL)
    found = [
        (-scores[i], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in ids.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(found)]
