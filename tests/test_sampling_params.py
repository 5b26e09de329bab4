"""Sampling parameters: impossible values are refused and the field is named."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.errors import RequestError
from tessera.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", float("inf")),
        ("repetition_penalty", 1e-40),
        ("presence_penalty", 2.1),
        ("frequency_penalty", "high"),
        ("seed", 2**63),
        ("logit_bias", [1, 2]),
        ("logit_bias", {5: 101}),
        ("logit_bias", {"a": 1}),
        ("stop", [""]),
        ("stop", [3]),
        ("stop", {"a": 1}),
        ("stop", ["x" * 4000, "y" * 4000]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "END"),
        ("max_tokens", -1),
        ("min_tokens", 17),
        ("logprobs", 65),
        ("prompt_logprobs", -1),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("logit_bias", {"a": 1}, "a token id of logit_bias must be a whole number from 0 to 2147483647, got 'a'"),
        ("logit_bias", {5: "a"}, "logit_bias must be a number from -100 to 100, got 'a'"),
        ("stop_token_ids", ["a"], "a token id of stop_token_ids must be a whole number from 0 to 2147483647, got 'a'"),
        ("stop_token_ids", "END", "stop_token_ids must be a list of token ids, got 'END'"),
        ("stop", 5, "stop must be a string or a list of strings, got 5"),
    ],
)
def test_a_refusal_says_which_part_of_a_value_is_wrong_and_what_it_may_be(field: str, value: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.message == says


def test_the_spellings_that_vllm_takes_are_taken() -> None:
    params = SamplingParams(stop="END", stop_token_ids=None, top_k=-1)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids, params.top_k) == (["END"], [], 0)
