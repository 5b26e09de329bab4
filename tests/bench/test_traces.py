"""Traces are read as their authors wrote them, and prompts are alike where a trace says so and nowhere else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tessera.bench.online.options import OnlineOptions
from tessera.bench.online.trace import Arrival, Trace, poisson
from tessera.bench.online.trace_files import read_trace, write_mooncake
from tessera.bench.online.trace_prompts import Vocabulary, calls_of, warmup_calls
from tessera.errors import ConfigError

IDS = Vocabulary(range(100, 5000))
MOONCAKE = [
    {"timestamp": 27482, "input_length": 1000, "output_length": 52, "hash_ids": [46, 47]},
    {"timestamp": 30535, "input_length": 1300, "output_length": 26, "hash_ids": [46, 47, 2353]},
    {"timestamp": 28535, "input_length": 512, "output_length": 1, "hash_ids": [9]},
]
QWEN = [
    {
        "chat_id": 159,
        "parent_chat_id": -1,
        "timestamp": 61.114,
        "input_length": 40,
        "output_length": 132,
        "type": "text",
        "turn": 1,
        "hash_ids": [1089, 1090, 1091],
    },
    {
        "chat_id": 160,
        "parent_chat_id": 159,
        "timestamp": 63.614,
        "input_length": 60,
        "output_length": 7,
        "type": "text",
        "turn": 2,
        "hash_ids": [1089, 1090, 5, 6],
    },
]


def _file(tmp_path: Path, lines: Sequence[Any]) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def _prompts(trace: Trace, *salt: int) -> list[list[int]]:
    return [list(call.prompt) for call in calls_of(trace, IDS, scale=1, salt=salt) if isinstance(call.prompt, list)]


def _num_alike(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_mooncake_is_in_milliseconds_and_shares_blocks_of_512_tokens(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, MOONCAKE))
    assert [each.at_s for each in trace.arrivals] == pytest.approx([0, 1.053, 3.053])
    first, second, third = _prompts(trace, 0)
    assert (len(first), len(second), len(third)) == (1000, 512, 1300)
    assert first == third[:1000] and third[1024:] != first[: 1300 - 1024]
    assert not set(pairwise(second)) & set(pairwise(first))
    assert [call.max_tokens for call in calls_of(trace, IDS, scale=1, salt=(0,))] == [52, 1, 26]


def test_qwen_is_in_seconds_and_shares_blocks_of_16_tokens(tmp_path: Path) -> None:
    trace = read_trace(_file(tmp_path, QWEN))
    assert [each.at_s for each in trace.arrivals] == pytest.approx([0, 2.5]) and trace.block_tokens == 16
    first, second = _prompts(trace, 0)
    assert (len(first), len(second), _num_alike(first, second)) == (40, 60, 32)


def test_what_is_shared_is_found_in_time_that_grows_as_the_trace_does() -> None:
    ids = [tuple(range(4000)), (*range(3000), -1, *range(3001, 4000)), tuple(range(4000)), (7, *range(1, 4000))]
    arrivals = [Arrival(0.0, 4000 * 16 - 3, 1, each) for each in ids]
    trace = Trace("long", arrivals, 16)
    began = time.process_time()
    assert trace.shared_share == pytest.approx((3000 * 16 + 4000 * 16 - 3) / (4 * (4000 * 16 - 3)))
    assert time.process_time() - began < 0.25  # with every beginning copied and hashed it takes ten times as long
    assert "shared_share" in vars(trace), "kept for the other rows"


def test_lines_without_hash_ids_share_nothing(tmp_path: Path) -> None:
    lines = [{"timestamp": i, "input_length": 600, "output_length": 5} for i in range(4)]
    prompts = _prompts(read_trace(_file(tmp_path, [*lines, MOONCAKE[0]])), 0)
    assert max(_num_alike(a, b) for i, a in enumerate(prompts) for b in prompts[:i]) <= 1


def test_a_last_block_without_an_id_is_shared_with_none(tmp_path: Path) -> None:
    lines = [{"timestamp": i, "input_length": 600, "output_length": 5, "hash_ids": [8]} for i in range(2)]
    first, second = _prompts(read_trace(_file(tmp_path, lines)), 0)
    assert len(first) == len(second) == 600 and 512 <= _num_alike(first, second) <= 514


def test_what_is_written_reads_back_as_the_same_prompts(tmp_path: Path) -> None:
    trace = poisson(rate=5, number=20, input_len="300..1200", output_len="5..9", seed=3)
    write_mooncake(tmp_path / "new" / "poisson.jsonl", trace)
    again = read_trace(tmp_path / "new" / "poisson.jsonl")
    assert _prompts(again, 7) == _prompts(trace, 7)
    assert [each.at_s for each in again.arrivals] == pytest.approx([each.at_s for each in trace.arrivals], abs=0.00051)
    assert [each.output_tokens for each in again.arrivals] == [each.output_tokens for each in trace.arrivals]
    with pytest.raises(ConfigError, match="blocks of 16 tokens, Mooncake's have 512"):
        write_mooncake(tmp_path / "x.jsonl", read_trace(_file(tmp_path, QWEN)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oh", "malformed"),
        ("[1]", "Expected `object`"),
        ({"timestamp": 1, "input_length": 5}, "output_length"),
        ({"timestamp": "1", "input_length": 5, "output_length": 5}, "timestamp"),
        ({"timestamp": 1, "input_length": 0, "output_length": 5}, "input_length 0, not 1 to"),
        ({"timestamp": 1, "input_length": 5, "output_length": -1}, "output_length -1, not 1 to"),
        ({"timestamp": -1, "input_length": 5, "output_length": 1}, "negative"),
        ({"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [-4]}, "negative"),
        ({"timestamp": 1, "input_length": 600, "output_length": 1, "hash_ids": [4, 5, 6]}, "3 hash_ids for 600 tokens"),
        ({"timestamp": 1, "input_length": 60, "output_length": 1, "hash_ids": [4, 5]}, "2 hash_ids for 60 tokens"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, line: Any, words: str) -> None:
    path = _file(tmp_path, [MOONCAKE[0], "", line])
    with pytest.raises(ConfigError, match=r"trace\.jsonl line 3") as caught:
        read_trace(path)
    assert words in caught.value.message


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no trace"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="has no request"):
        read_trace(_file(tmp_path, [""]))
    with pytest.raises(ConfigError, match="with and without chat_id"):
        read_trace(_file(tmp_path, [QWEN[0], MOONCAKE[0]]))
    with pytest.raises(ConfigError, match="has 3 requests, --num-requests asks for 4"):
        read_trace(_file(tmp_path, MOONCAKE), 4)
    assert len(read_trace(_file(tmp_path, [MOONCAKE[0], "{oh"]), 1).arrivals) == 1


def test_poisson_arrivals_have_the_rate_the_lengths_and_the_seed_that_were_asked_for() -> None:
    trace = poisson(rate=20, number=4000, input_len="100..500", output_len="64", seed=1)
    at = [each.at_s for each in trace.arrivals]
    gaps = [b - a for a, b in pairwise(at)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert at[0] == 0 and mean == pytest.approx(1 / 20, rel=0.06)
    assert deviation == pytest.approx(mean, rel=0.06)  # as exponential gaps have it
    inputs = [each.input_tokens for each in trace.arrivals]
    assert (min(inputs), max(inputs)) == (100, 500) and {each.output_tokens for each in trace.arrivals} == {64}
    assert poisson(rate=20, number=9, input_len="5", output_len="5", seed=1).digest == (
        poisson(rate=20, number=9, input_len="5", output_len="5", seed=1).digest
    )
    assert len({poisson(rate=20, number=9, input_len="5", output_len="5", seed=i).digest for i in range(5)}) == 5


def test_a_scale_multiplies_gaps_and_changes_nothing_else() -> None:
    trace = poisson(rate=2, number=10, input_len="50", output_len="8", seed=0)
    one, heavy = (calls_of(trace, IDS, scale=scale, salt=(0,)) for scale in (1.0, 0.4))
    assert [call.at_s for call in heavy] == pytest.approx([0.4 * call.at_s for call in one])
    assert [(call.prompt, call.max_tokens, call.fields) for call in heavy] == [
        (call.prompt, call.max_tokens, call.fields) for call in one
    ]
    assert one[3].fields == {"temperature": 0, "ignore_eos": True, "seed": 3}


def test_prompts_depend_on_the_salt_and_warm_up_shares_no_beginning_with_them() -> None:
    trace = poisson(rate=2, number=6, input_len="64", output_len="8", seed=0)
    assert _prompts(trace, 1, 2) == _prompts(trace, 1, 2)
    warm = [call.prompt for call in warmup_calls(trace, IDS, 8, salt=(1, 2)) if isinstance(call.prompt, list)]
    every = [*_prompts(trace, 1, 2), *_prompts(trace, 1, 3), *_prompts(trace, 2, 2), *warm]
    assert len(warm) == 8 and {len(prompt) for prompt in every} == {64}
    assert max(_num_alike(a, b) for i, a in enumerate(every) for b in every[:i]) <= 2
    assert {token for prompt in every for token in prompt} <= set(IDS.token_ids)


def test_texts_have_as_many_words_as_the_trace_has_tokens() -> None:
    trace = poisson(rate=2, number=3, input_len="40", output_len="8", seed=0)
    texts = [call.prompt for call in calls_of(trace, Vocabulary(), scale=1, salt=(0,))]
    assert [len(text.split()) for text in texts if isinstance(text, str)] == [40, 40, 40] and len(
        set(map(str, texts))
    ) == 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_len": "0"}, "--input-len '0'"),
        ({"output_len": "9..5"}, "--output-len '9..5'"),
        ({"output_len": "many"}, "--output-len 'many'"),
        ({"trace": "FILE", "rate": 2.0}, "--rate 2.0 is not for a file with times"),
        ({"trace": "FILE", "input_len": "5"}, "--input-len 5 is not for"),
        ({"trace": "FILE", "output_len": "5"}, "--output-len 5 is not for"),
        ({"trace": "FILE", "max_output_len": 5}, "--max-output-len 5 is not for"),
        ({"max_output_len": 5}, "--max-output-len 5 is not for --trace poisson"),
        ({"trace": "nowhere.jsonl"}, "there is no trace nowhere.jsonl"),
    ],
)
def test_options_that_make_no_trace_are_refused(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    if given.get("trace") == "FILE":
        given = given | {"trace": str(_file(tmp_path, MOONCAKE))}
    with pytest.raises(ConfigError) as caught:
        OnlineOptions(**given).make_trace(0)
    assert words in caught.value.message and caught.value.hint


@pytest.mark.parametrize("given", [{"scales": "1"}, {"rate": 5.0}])
def test_where_no_arrival_counts_what_moves_arrivals_is_refused(given: dict[str, Any]) -> None:
    assert OnlineOptions(concurrency=2).scale_list == [1.0]
    with pytest.raises(ConfigError, match="is not for --concurrency, where no arrival counts"):
        _ = OnlineOptions(concurrency=2, **given).scale_list


@pytest.mark.parametrize("scales", ["", "0", "1,x", "1,1", "0.4,-1"])
def test_scales_that_are_none_are_refused(scales: str) -> None:
    with pytest.raises(ConfigError, match="--scales"):
        _ = OnlineOptions(scales=scales).scale_list
