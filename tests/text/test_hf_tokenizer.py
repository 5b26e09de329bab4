"""Tokenizers out of Hugging Face folders, against transformers' own reading of the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tessera.config import ModelConfig
from tessera.errors import ConfigError, ModelError, RequestError
from tessera.model.source import ModelSource
from tessera.text import hf_tokenizer
from tessera.text.pieces import Spelling
from tessera.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["hello world", " hello  worlds\n", "<|im_end|>ok<tool>", "grüße 🙂", ""]


@pytest.fixture(scope="session")
def backend_json() -> str:
    """A small byte-level BPE with two special tokens and one added one, and truncation that must not act."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["hello world " * 20, "hello worlds"], trainer)
    backend.add_tokens([AddedToken("<tool>", special=False)])
    backend.enable_truncation(2)
    return backend.to_str()


SETTINGS: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {
        "__type": "AddedToken",
        "content": "<|im_end|>",
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
    },
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
}


def make_folder(folder: Path, backend_json: str | None, **settings: Any) -> ModelSource:
    if backend_json is not None:
        (folder / "tokenizer.json").write_text(backend_json)
    (folder / "tokenizer_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    return ModelSource("folder", folder, "made")


def load(source: ModelSource, **config: Any) -> Tokenizer:
    return load_tokenizer(source, ModelConfig(**config))


@pytest.mark.parametrize(
    "settings",
    [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}],
)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, backend_json: str, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = load(make_folder(tmp_path, backend_json, **settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs(text).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(tokenizer.encode(text)) == theirs.decode(
            theirs(text).input_ids, skip_special_tokens=True
        )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.end_token_ids) == (0, 1, (1, 0))
    assert tokenizer.vocab_size == len(theirs)


def test_default_tokenizer_saved_as_a_folder_reads_the_same(smollm: Tokenizer, tmp_path: Path) -> None:
    tokenizer = load(make_folder(tmp_path, smollm.backend.to_str(), bos_token="<|im_start|>"))
    for text in TEXTS:
        assert tokenizer.encode(text) == smollm.encode(text)
    assert tokenizer.special_token_ids == smollm.special_token_ids


def older_folder(tmp_path: Path, backend_json: str, model_type: str) -> ModelSource:
    """A model whose tokenizer is in files that only transformers reads, without weights."""
    model = json.loads(backend_json)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return make_folder(tmp_path, None, tokenizer_class="GPT2Tokenizer")


def test_folder_of_an_older_format_goes_through_transformers(tmp_path: Path, backend_json: str) -> None:
    source = older_folder(tmp_path, backend_json, "gpt2")
    tokenizer = load(source, load_format="dummy")
    assert tokenizer.decode(tokenizer.encode("hello worlds")) == "hello worlds"
    assert tokenizer.pieces.spelling is Spelling.BYTE_LEVEL


def test_template_comes_from_flag_then_file_then_config(tmp_path: Path, backend_json: str) -> None:
    source = make_folder(tmp_path, backend_json)
    messages = [{"role": "user", "content": "hi"}]
    assert load(source).render_chat(messages) == "<s>hi<|im_end|>"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    assert load(source).render_chat(messages) == "file hi"
    (tmp_path / "mine.jinja").write_text("flag {{ messages[0].content }}")
    assert load(source, chat_template=str(tmp_path / "mine.jinja")).render_chat(messages) == "flag hi"


def test_named_templates_take_the_default_one(tmp_path: Path, backend_json: str) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    messages = [{"role": "user", "content": "hi"}]
    assert load(make_folder(tmp_path, backend_json, chat_template=named)).render_chat(messages) == "plain"


def test_model_without_a_template_is_a_request_error_with_a_hint(tmp_path: Path, backend_json: str) -> None:
    tokenizer = load(make_folder(tmp_path, backend_json, chat_template=None))
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert caught.value.hint is not None and "--chat-template" in caught.value.hint


def test_tokenizer_flag_takes_a_file_or_a_folder(tmp_path: Path, backend_json: str, smollm: Tokenizer) -> None:
    source = make_folder(tmp_path, backend_json)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text(smollm.backend.to_str())
    for path in (other, other / "tokenizer.json"):
        assert load(source, tokenizer=str(path)).encode("hello world") == smollm.encode("hello world")


def test_missing_and_damaged_tokenizers_name_the_file_and_the_flag(tmp_path: Path, backend_json: str) -> None:
    source = ModelSource("folder", tmp_path, "made")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json") as caught:
        load(source, load_format="dummy")
    assert "--tokenizer" in str(caught.value)
    make_folder(tmp_path, backend_json[:-40])
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a tokenizer"):
        load(source)
    make_folder(tmp_path, backend_json)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"):
        load(source)
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load(source, tokenizer=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        load(source, chat_template=str(tmp_path / "none.jinja"))


def test_half_a_surrogate_pair_is_a_request_error(smollm: Tokenizer) -> None:
    with pytest.raises(RequestError, match="half of a surrogate pair at character 2") as caught:
        smollm.encode("ab\ud83d")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "config.json is not valid JSON: "),
        ("{}", "config.json has no model_type"),
        ('{"model_type": "llama", "hidden_size": "x"}', "config.json has hidden_size 'x', not a whole number"),
        ('{"model_type": "llama"}', "has no safetensors file"),
    ],
)
def test_a_broken_model_is_named_before_transformers_is_asked_for_its_tokenizer(
    config: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(_: Path) -> None:
        raise AssertionError("transformers was asked")

    monkeypatch.setattr(hf_tokenizer, "_through_transformers", asked)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as caught:
        load(ModelSource("folder", tmp_path, "made"))
    assert problem in caught.value.message and caught.value.hint


def test_a_folder_asked_only_for_its_tokenizer_needs_no_weights(tmp_path: Path, backend_json: str) -> None:
    source = older_folder(tmp_path, backend_json, "gemma2")
    assert load_tokenizer(source, ModelConfig(), computes=False).encode("hello")


@pytest.mark.parametrize(
    ("said", "quoted"),
    [
        ("Cannot build it from one of: \n(1) a file, \n(2) a class. \nInstall tiktoken.",
         "Cannot build it from one of: (1) a file, (2) a class"),
        ("Validation error for field 'hidden_size':\n    TypeError: expected int, got 'x'",
         "Validation error for field 'hidden_size': TypeError: expected int, got 'x'"),
        ("\n\nIt is not at 'v1.2/x.json'. If you tried", "It is not at 'v1.2/x.json'"),
        ("no:\n", "no"),
        ("", "ValueError"),
        ("x" * 400, "x" * 300 + "..."),
    ],
)  # fmt: skip
def test_an_error_of_transformers_is_quoted_as_one_whole_sentence(
    said: str, quoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    def refuse(*_: object, **__: object) -> None:
        raise ValueError(said)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError) as caught:
        load(ModelSource("folder", tmp_path, "made"), load_format="dummy")
    assert caught.value.message.endswith(f"transformers finds no tokenizer: {quoted}")
