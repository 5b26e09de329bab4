"""Workloads are the published ones, and what cannot be run is refused with a hint before anything is loaded."""

from __future__ import annotations

import dataclasses

import pytest

from tessera import cli
from tessera.bench.offline.options import OfflineOptions
from tessera.bench.offline.workloads import PRESETS, works_of
from tessera.errors import ConfigError


def test_mini_has_the_token_counts_that_others_published() -> None:
    prompts, output_lens = PRESETS["mini"].draw()
    assert (len(prompts), sum(map(len, prompts)), sum(output_lens)) == (256, 144_831, 144_160)
    assert max(map(max, prompts)) < 10_000
    assert PRESETS["mini"].draw() == (prompts, output_lens)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rose", (128, 256, 64)), ("single", (1, 128, 512)), ("long", (16, 8192, 256)), ("quick", (8, 64, 16))],
)
def test_presets_of_fixed_lengths_are_as_long_as_they_say(name: str, shape: tuple[int, int, int]) -> None:
    prompts, output_lens = PRESETS[name].draw()
    assert ({len(prompt) for prompt in prompts}, set(output_lens)) == ({shape[1]}, {shape[2]})
    assert len(prompts) == shape[0] and len({tuple(prompt) for prompt in prompts}) == shape[0], "prompts are distinct"


def test_own_lengths_are_drawn_within_their_range() -> None:
    (work,) = works_of(OfflineOptions(num_prompts=200, input_len="3..5", output_len="7"))
    assert {len(prompt) for prompt in work.prompts} == {3, 4, 5} and set(work.output_lens) == {7}
    assert work.workload.max_len == 12 and set(work.lengths) == {10, 11, 12}


def test_several_presets_are_drawn_as_each_alone_in_the_order_given() -> None:
    works = works_of(OfflineOptions(preset="single, rose"))
    assert [work.workload.name for work in works] == ["single", "rose"]
    assert [(work.prompts, work.output_lens) for work in works] == [PRESETS[name].draw() for name in ("single", "rose")]


def test_a_model_with_too_small_a_vocabulary_or_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="96 token ids") as refused:
        PRESETS["quick"].check_fits("tiny", 96, 1000)
    assert refused.value.hint
    with pytest.raises(ConfigError, match="80 tokens a sequence, --max-model-len is 4") as refused:
        PRESETS["quick"].check_fits("tiny", 50_000, 2048, 4)
    assert refused.value.hint == "use --max-model-len 80, or leave it out"
    with pytest.raises(ConfigError, match="8448 tokens a sequence, tiny takes 2048"):
        PRESETS["long"].check_fits("tiny", 50_000, 2048)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset rose --num-prompts 3", "exclude each other"),
        ("--num-prompts 3", "without --input-len and --output-len"),
        ("--num-prompts 3 --input-len x --output-len 4", "neither a length nor a range"),
        ("--num-prompts 3 --input-len 9..4 --output-len 4", "does not go up"),
        ("--num-prompts 0 --input-len 9 --output-len 4", "num_prompts must be"),
        ("--preset huge", "'huge' is none that is known"),
        ("--preset rose,", "'' is none that is known"),
        ("--preset rose,mini,rose", "'rose' is named twice"),
        ("--preset rose --max-model-len 200", "needs 320 tokens a sequence"),
        ("--max-model-len 4", "use --max-model-len 80"),
        ("--out /proc/none/x.jsonl", "--out /proc/none/x.jsonl cannot be written: "),
        ("--temperature -1", "temperature must be"),
        ("--warmup -1", "warmup must be"),
        ("--pass-timeout 0", "pass_timeout must be"),
        ("--repeats 0", "repeats must be"),
        ("--peer sglang", "none that is known"),
        ("--peer hf,hf", "named twice"),
        ("--peer hf --peer-python vllm=python3", "does not take part"),
        ("--peer hf --peer-python python3", "not of the form"),
        ("--peer hf --peer-python hf=/no/such/python", "cannot be run"),
        ("--peer hf --peer-option batch_size=4", "not of the form"),
        ("--peer hf --peer-option vllm:x=4", "does not take part"),
        ("--peer hf --peer-option hf:dtype=float32", "change the comparison"),
        ("--out rows.json", "does not end in .jsonl"),
        ("--out /", "--out / does not end in .jsonl"),
        ("--out ..", "does not end in .jsonl"),
        ("--backends none_such", "none_such"),
        ("--attention naive", "decided by this benchmark"),
        ("--tokenizer x", "decided by this benchmark"),
        ("--no-prove-attention", "decided by this benchmark"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_a_hint(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "offline", "--backends", "naive", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert words in said and "\nhint: " in said and "Traceback" not in said


def test_every_field_has_a_range_or_needs_none() -> None:
    numbers = {
        field.name for field in dataclasses.fields(OfflineOptions) if field.type in ("int", "float", "int | None")
    }
    assert numbers == set(OfflineOptions.RANGES)
