"""The command `tessera` as a user meets it: real processes, the default model."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tessera import cli
from tessera.commands.flags import Parser, add_model, add_sampling, engine_config, sampling
from tessera.commands.serve import describe
from tessera.config import EngineConfig, ServerConfig, section_types, settings_of
from tessera.types import AttentionBucket, AttentionChoice, AttentionProof, EngineInfo, KernelUse, SamplingParams

TESSERA = (sys.executable, "-m", "tessera")
SMALL = ("--num-pages", "100", "--max-model-len", "512", "--dtype", "float32", "--cpu-threads", "1")


def run(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TESSERA, *args], input=stdin, capture_output=True, text=True, timeout=60, env=os.environ | environment
    )


@pytest.mark.parametrize("args", [["--help"], ["serve", "--help"], ["generate", "--help"], ["version"]])
def test_help_does_not_import_torch(args: list[str]) -> None:
    code = f"import sys; from tessera import cli\ntry: cli.main({args})\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n") and len(done.stdout) > 10


def test_every_setting_is_a_flag_with_its_docstring() -> None:
    text = " ".join(run("serve", "--help").stdout.split())
    for section in (*section_types(EngineConfig).values(), ServerConfig):
        for setting in settings_of(section):
            assert setting.flag in text and " ".join(setting.help.split()[:3]) in text, setting.name


def test_every_sampling_parameter_is_a_flag_that_arrives() -> None:
    parser = Parser()
    add_sampling(parser)
    words = "--n 2 --temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 1"
    words += " --frequency-penalty -1 --logit-bias 5=-2 --stop a --stop b --stop-token-ids 7 --max-tokens 9"
    words += " --include-stop-str-in-output --ignore-eos --min-tokens 4 --logprobs 1 --prompt-logprobs 0"
    words += " --no-skip-special-tokens"
    params = sampling(parser.parse_args(words.split()))
    default = SamplingParams()
    for name in SamplingParams.__dataclass_fields__.keys() - {"seed"}:
        assert getattr(params, name) != getattr(default, name), name
    assert params.logit_bias == {5: -2.0} and params.stop == ["a", "b"]


def test_flags_become_the_settings_and_defaults_stay() -> None:
    parser = Parser()
    add_model(parser)
    config = engine_config(parser.parse_args(["folder", "--seed", "3", "--no-enable-prefix-caching"]))
    assert (config.model.model, config.model.seed) == ("folder", 3)
    assert not config.cache.enable_prefix_caching
    assert config.scheduler == EngineConfig().scheduler


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["serve", "--prot", "5"], "unknown flag '--prot'", "did you mean --port?"),
        (["serve", "--max-model", "5"], "unknown flag '--max-model'", "did you mean --max-model-len?"),
        (["generate", "--temprature=1"], "unknown flag '--temprature'", "did you mean --temperature?"),
        (["serve", "a", "b"], "unexpected word 'b'", "see `tessera serve --help`"),
        (["serve", "--port", "http"], "--port", "see `tessera serve --help`"),
        (["serve", "--port", "70000"], "65535", "--port"),
        (["serve", "--dtype", "int3"], "invalid choice", "see `tessera serve --help`"),
        (["serve", "--engine-timeout", "nan"], "engine_timeout", "--engine-timeout"),
        (["serve", "--tensor-parallel-size", "2"], "tensor_parallel_size 2", "--tensor-parallel-size"),
        (["serve", "a", "--model", "b"], "two models are given: a and --model b", "leave one"),
        (["serve", "--host", "256.1.1.1"], "256.1.1.1", "--host"),
        (["serve", "--host", "a..b"], "a..b", "--host"),
        (["generate", "--prompt", "a", "--temperature", "-1"], "temperature", "mend --temperature"),
        (["generate", "--prompt", "a", "--logprobs", "1"], "--json", "add --json"),
        (["generate", "--prompt", "a", "--system", "b"], "--system", "add --chat"),
        (["generate"], "standard input is empty", "give --prompt TEXT"),
        (
            ["generate", "Once upon"],
            "'Once upon' names no model",
            "give a text with --prompt TEXT",
        ),
        (["generate", "word " * 99], "names no model", "give a text with --prompt TEXT"),
        (["chat", "word" * 99], "no file or folder here", "give a local folder"),
        (["generate", "/nowhere/at/all"], "'/nowhere/at/all': no such file or folder", "check --model"),
        (["chat", "--n", "2"], "one answer a turn", "leave --n out"),
        (["backends", "--attention", "flash_attn", "--prove"], "library with variants", "flash_attn:4"),
        (["generate", "--prompt", "a", "--attention", "torch_spda"], "'torch_spda'", "did you mean torch_sdpa?"),
        (["generate", "--prompt", "a", "--attention", "Triton"], "'Triton'", "did you mean triton?"),
        (["verify", "auto"], "auto is no attention backend", "see `tessera backends`"),
        (["generate", "--prompt", "a", "--vision-attention", "naive"], "no vision tower", "leave --vision-attention"),
        (["bake"], "'bake'", "see `tessera --help`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_a_sentence_and_a_hint(args: list[str], message: str, hint: str) -> None:
    done = run(*args)
    first, _, rest = done.stderr.partition("\n\n")
    assert done.returncode in (1, 2) and done.stdout == ""
    assert first.startswith("error: ") and message in first and "\n" not in first, done.stderr
    assert rest.startswith("hint: ") and hint in rest and "Traceback" not in rest


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_input_that_is_no_text_gets_a_sentence(command: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*TESSERA, command, *SMALL], input=b"\xff\xfe\n", capture_output=True, env=environment)
    assert done.returncode == 1 and b"error: standard input is no text" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_start_table_says_why_the_other_backends_lost() -> None:
    choice = AttentionChoice(
        "decode", "a", "it is first", {"b": ["no GPU", "no bfloat16"], "c": ["slower"], "d": ["slower"]}
    )
    info = EngineInfo("m", "n", "float32", "cpu", 9, 9, [], 16, 9, 9, 9, [choice])
    rows = describe(info)
    assert rows[-3:] == [
        ("decode attention", "a (it is first)"),
        ("", "not b: no GPU; no bfloat16"),
        ("", "not c, d: slower"),
    ]


def test_the_start_table_says_which_weights_multiply() -> None:
    info = EngineInfo("m", "n", "bfloat16", "cpu", 9, 9, [], 16, 9, 9, 9, [])
    assert ("weights", "bfloat16") in describe(info)
    kept = replace(info, num_four_bit_layers=7)
    assert ("weights", "bfloat16, in steps of few tokens the file's own 4-bit ones in 7 layers") in describe(kept)


def test_the_start_table_shows_proofs_and_what_was_measured() -> None:
    bucket = AttentionBucket("8 x 512", 8, 1, 512, "a", "b", {"a": 0.5, "b": 0.75})
    uses = [KernelUse("kernel_a", 30, 99.0), KernelUse("merge_a", 30, 9.0), KernelUse("third", 1, 1.0)]
    proof = AttentionProof("decode", "a", None, uses, 0.125, "8 x 512", {"torch": "2"}, "cpu")
    choice = AttentionChoice("decode", "a", "auto: measured", {"c": ["no GPU"]}, [bucket], [proof])
    info = EngineInfo("m", "n", "float32", "cpu", 9, 9, [], 16, 9, 9, 9, [choice])
    assert describe(info)[-4:] == [
        ("decode attention", "a (auto: measured)"),
        ("", "proven: a ran kernel_a x30, merge_a x30, 12% of a step of 8 x 512"),
        ("", "8 x 512: a, then b (ms: a 0.500, b 0.750)"),
        ("", "not c: no GPU"),
    ]


def test_a_variable_that_means_nothing_is_refused_and_the_key_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("version", TESSERA_APIKEY="x")
    assert done.returncode == 2 and "TESSERA_APIKEY" in done.stderr and "did you mean TESSERA_API_KEY?" in done.stderr
    monkeypatch.setenv("TESSERA_API_KEY", "x")
    assert cli.main(["version"]) == 0


def test_no_command_is_help_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_generate_writes_the_text_and_nothing_else_to_stdout() -> None:
    done = run(
        "generate", "--chat", "--temperature", "0", "--max-tokens", "12", *SMALL, stdin="What is the capital of France?"
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and done.stdout.endswith("\n")


def test_generate_as_json_has_one_object_a_prompt_in_order() -> None:
    prompts = ("The capital of France is", "1, 2, 3, 4,")
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    done = run("generate", *flags, "--json", "--temperature", "0", "--max-tokens", "4", "--logprobs", "1", *SMALL)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["prompt"] for result in results] == list(prompts), done.stderr
    for result in results:
        output = result["outputs"][0]
        assert output["finish_reason"] == "length" and len(output["token_ids"]) == len(output["logprobs"]) == 4
    assert "Paris" in results[0]["outputs"][0]["text"]


def test_several_prompts_come_out_in_order_whatever_finishes_first() -> None:
    flags = ("--prompt", "1, 2, 3, 4,", "--prompt", "The capital of France is")
    both = run("generate", *flags, "--temperature", "0", "--max-tokens", "6", "--stop", " Paris", *SMALL)
    lines = both.stdout.splitlines()
    assert both.returncode == 0 and len(lines) == 2 and "5" in lines[0] and "Paris" not in lines[1]


def test_chat_remembers_until_told_to_forget_and_ends_with_exit() -> None:
    """The same question is answered alike when fresh and after /clear, otherwise in between."""
    talk = "What did I say?\nI like pears.\nWhat did I say?\n\n/clear\n/quit\nWhat did I say?\n/exit\nnever read\n"
    done = run("chat", "--temperature", "0", "--max-tokens", "8", "--stop", "\n", *SMALL, stdin=talk)
    fresh, _, later, cleared = done.stdout.splitlines()
    assert done.returncode == 0 and fresh == cleared != later, done.stderr
    assert "/quit is no command: /exit ends, /clear forgets" in done.stderr


@pytest.mark.parametrize("command", [("chat",), ("generate", "--chat", "--prompt", "Hi")])
def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded(command: tuple[str, ...]) -> None:
    done = run(*command, "--model", "dummy:7b", stdin="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "error: dummy-7b has no chat template, so it cannot be talked to\n\nhint: give one with"
    )


def test_a_conversation_too_long_for_the_context_is_said_and_the_chat_goes_on() -> None:
    done = run("chat", "--max-tokens", "4", *SMALL, stdin="word " * 600 + "\nHi\n")
    assert done.returncode == 0 and "512" in done.stderr and "/clear" in done.stderr
    assert done.stdout.strip()


def _read_until(descriptor: int, words: bytes, seconds: float = 40) -> bytes:
    seen, deadline = b"", time.monotonic() + seconds
    while words not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([descriptor], [], [], 0.1)[0]:
            seen += os.read(descriptor, 4096)
    return seen


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_ctrl_c_in_a_chat_stops_the_answer_and_not_the_chat(terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    process = subprocess.Popen(
        [*TESSERA, "chat", "--temperature", "0", "--ignore-eos", *SMALL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )
    os.close(theirs)
    _read_until(ours, b"> ")
    os.write(ours, b"Tell me a very long story.\n")
    _read_until(ours, b"story.\r\n")
    time.sleep(1)
    os.write(ours, b"\x03")
    assert b"Traceback" not in _read_until(ours, b"> ", 10)
    os.write(ours, b"\x04")
    assert process.wait(15) == 0


def test_backends_lists_every_phase_with_a_verdict() -> None:
    done = run("backends", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert {row["phase"] for row in rows} == {"prefill", "decode", "vision"}
    assert {"naive", "torch_sdpa"} <= {row["backend"] for row in rows}
    assert all(row["usable"] == (row["reasons"] == []) for row in rows)
    done = run("backends", VLLM_ATTENTION_BACKEND="XFORMERS")
    assert all(row["backend"] in done.stdout for row in rows)
    assert "VLLM_ATTENTION_BACKEND=XFORMERS has no effect" in done.stderr


def test_backends_prove_lists_the_kernels_that_ran_in_the_model() -> None:
    named = ("--prefill-attention", "torch_sdpa", "--decode-attention", "naive")
    done = run("backends", "--prove", "--json", *named, *SMALL, SGLANG_ATTENTION_BACKEND="fa3")
    proofs = {proof["phase"]: proof for proof in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr
    assert (proofs["prefill"]["backend"], proofs["decode"]["backend"]) == ("torch_sdpa", "naive")
    (use,) = proofs["prefill"]["symbols"]
    assert (use["name"], use["calls"]) == ("aten::_scaled_dot_product_flash_attention_for_cpu", 30)
    assert {use["name"] for use in proofs["decode"]["symbols"]} == {"aten::bmm", "aten::_softmax"}
    assert "SGLANG_ATTENTION_BACKEND=fa3 has no effect" in done.stderr
    table = run("backends", "--prove", *named, *SMALL).stdout
    assert "aten::_softmax" in table and "torch 2" in table


def test_the_demo_works_without_a_terminal() -> None:
    """Three questions at once, an answer each, every page returned: the exit code says so."""
    demo = Path(__file__).parent.parent / "examples" / "demo.py"
    done = subprocess.run([sys.executable, str(demo)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout and "0 not returned" in done.stdout and "decode attention" in done.stdout
    assert "\x1b" not in done.stdout


def test_backends_lists_those_that_are_named_and_refuses_unknown_ones() -> None:
    done = run("backends", "--json", "--device", "cpu", "--decode-attention", "naive")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["backend"], row["phase"]) for row in rows] == [("naive", "decode")]
    refused = run("backends", "--attention", "niave")
    assert refused.returncode == 2 and "did you mean naive?" in refused.stderr
