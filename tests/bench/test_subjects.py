"""What `--backends` names, and what benchmarks offer of the engine's flags."""

from __future__ import annotations

import re

import pytest

from tessera import cli
from tessera.bench.subjects import wanted_backends
from tessera.commands.backends import model_shapes
from tessera.config import EngineConfig
from tessera.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("naive,torch_sdpa", ["naive", "torch_sdpa"]),
        ("naive,naive,torch_sdpa,naive", ["naive", "naive#2", "torch_sdpa", "naive#3"]),
        ("naive,naive#2", ["naive", "naive#2"]),
        ("naive+torch_sdpa,naive+torch_sdpa", ["naive+torch_sdpa", "naive+torch_sdpa#2"]),
    ],
)
def test_a_backend_named_again_is_a_subject_of_its_own(text: str, labels: list[str]) -> None:
    found = wanted_backends(text, model_shapes(EngineConfig())[1])
    assert [each.label for each in found] == labels and [each.subject.label for each in found] == labels
    assert found[0].settings == found[1].settings or text.startswith("naive,torch")
    assert all("#" not in name for each in found for name in each.asked.values())


def test_a_number_is_no_name() -> None:
    with pytest.raises(ConfigError, match="naive#0"):
        wanted_backends("naive#0", model_shapes(EngineConfig())[1])


DECIDED = ("--attention TEXT", "--prefill-attention", "--decode-attention", "--prove-attention")
REFUSED = {
    "online": DECIDED,
    "api": DECIDED,
    "ttft": (*DECIDED, "--model TEXT", "MODEL", "--enable-prefix-caching"),
    "offline": (*DECIDED, "--tokenizer", "--chat-template"),
}


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", command, "--help"])
    assert ended.value.code == 0
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("command", REFUSED)
def test_the_help_offers_no_flag_that_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _help(command, capsys)
    assert [flag for flag in REFUSED[command] if f" {flag}" in shown.replace("[", " ")] == []
    assert ("--max-num-seqs" in shown and "--backends" in shown) or command == "ttft"


def test_the_help_has_the_benchmarks_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    shown = _help("offline", capsys)
    assert "(default: False, for every pass has the same prompts)" in shown
    assert "in tokens. (default: what the longest workload takes)" in shown
    assert "(default: 256, or the prompts of the largest workload where they are fewer)" in shown
    assert "(default: True)" in _help("online", capsys).partition("--enable-prefix-caching, ")[2][:200]


@pytest.mark.parametrize(
    ("command", "flags", "message", "hint"),
    [
        ("offline", ["--attention", "naive"], "--attention is decided by this benchmark", "name backends with"),
        ("offline", ["--chat-template", "x"], "--chat-template is decided by this benchmark", "leave it out"),
        ("online", ["--attention", "naive"], "--attention naive is decided by the benchmark", "with --backends"),
        ("ttft", ["naive"], "--model naive is not for this benchmark", "--models A,B"),
        ("offline", ["--tokenizr", "x"], "unknown flag '--tokenizr'", "see `tessera bench offline --help`"),
    ],
)
def test_a_refused_flag_that_is_typed_is_told_why_and_none_is_proposed(
    command: str, flags: list[str], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", command, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said and hint in said.partition("hint: ")[2]
