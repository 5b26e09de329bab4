"""Stop strings against a brute-force oracle, over random cuts of the text."""

from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from tessera.text.stops import StopMatcher, StopStrings

texts = st.text("ab", max_size=24)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def oracle(text: str, stops: list[str], first_end: int) -> tuple[str, str] | None:
    """(text before, stop string) of the match that is complete first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if end >= first_end and text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return None


@given(
    text=texts, stops=stop_lists, cuts=st.lists(st.integers(0, 24)), min_pieces=st.integers(0, 3), include=st.booleans()
)
def test_any_cut_of_the_text_finds_what_the_oracle_finds(
    text: str, stops: list[str], cuts: list[int], min_pieces: int, include: bool
) -> None:
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    expected = oracle(text, stops, len("".join(parts[:min_pieces])) + 1)
    whole = text if expected is None else expected[0] + (expected[1] if include else "")
    matcher, shown = StopMatcher(StopStrings(stops), include=include), ""
    for i, part in enumerate(parts):
        shown += matcher.feed(part, counts=i >= min_pieces)
        assert whole.startswith(shown), "text of a stop string was given out"
    shown += matcher.flush()
    assert shown == whole
    assert matcher.found == (None if expected is None else expected[1])


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(StopStrings(["</s>", "\n\n"]), include=False)
    assert [matcher.feed(text) for text in ("ab\n", "c<", "/", "x</", "s", ">y", "z")] == [
        "ab",
        "\nc",
        "",
        "</x",
        "",
        "",
        "",
    ]
    assert matcher.found == "</s>"


def test_nothing_is_given_out_after_a_match() -> None:
    matcher = StopMatcher(StopStrings(["b"]), include=True)
    assert [matcher.feed("abc"), matcher.feed("d"), matcher.flush()] == ["ab", "", ""]


def test_long_repetitive_stop_strings_cost_no_more_than_the_text() -> None:
    stops = StopStrings(["a" * i + "b" for i in range(4000, 4032)])
    start = time.process_time()
    matcher = StopMatcher(stops, include=False)
    for _ in range(2000):
        matcher.feed("aaaa")
    assert time.process_time() - start < 10
