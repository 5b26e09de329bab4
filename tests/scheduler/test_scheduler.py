"""The scheduler on a paper model: whatever the schedule, every sequence gets its own tokens."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from paper_model import EOS, VOCAB_SIZE, PaperEngine, continuation
from tessera.scheduler.scheduler import SchedulerLimits
from tessera.types import SamplingParams


def limits(**changes: int | bool) -> SchedulerLimits:
    given: dict[str, int | bool] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": 64,
        "page_size": 4,
        "prefix_caching": True,
    }
    return SchedulerLimits(**(given | changes))  # type: ignore[arg-type]


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # prompts with the same first number share a prefix
        st.integers(1, 40),  # prompt length
        st.integers(0, 30),  # most tokens out
        st.booleans(),  # ignore_eos
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    requests=REQUESTS,
    page_size=st.sampled_from([1, 2, 4, 16]),
    spare_pages=st.integers(0, 30),
    budget=st.integers(1, 64),
    max_num_seqs=st.integers(1, 12),
    prefix_caching=st.booleans(),
    overlap=st.booleans(),
    data=st.data(),
)
def test_any_schedule_gives_every_sequence_its_own_tokens_and_leaks_no_page(
    requests: list[tuple[int, int, int, bool]],
    page_size: int,
    spare_pages: int,
    budget: int,
    max_num_seqs: int,
    prefix_caching: bool,
    overlap: bool,
    data: st.DataObject,
) -> None:
    """Arrivals at any step, aborts at any step, little memory, small budgets, shared prefixes."""
    max_model_len = 72
    num_pages = -(-max_model_len // page_size) + spare_pages
    engine = PaperEngine(
        num_pages,
        SchedulerLimits(max_num_seqs, budget, max_model_len, page_size, prefix_caching),
        overlap=overlap,
    )
    expected: dict[tuple[str, int], list[int]] = {}
    for number, (family, length, max_tokens, ignore_eos) in enumerate(requests):
        prompt = [(family * 7 + i) % 49 + 1 for i in range(length)]
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
        engine.add(str(number), prompt, params)
        expected[str(number), 0] = continuation(prompt, params, max_model_len)
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
        if data.draw(st.integers(0, 9)) == 0:
            victim = str(data.draw(st.integers(0, number)))
            if engine.scheduler.abort(victim):
                expected[victim, 0] = engine.tokens[victim, 0]
                engine.finished[victim, 0] = "abort"
    engine.run()
    assert engine.tokens == expected
    assert set(engine.finished) == set(expected)
    assert engine.scheduler.pool.num_available == num_pages
    assert not list(engine.scheduler.sequences())


def test_decodes_go_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    engine = PaperEngine(64, limits(max_num_batched_tokens=8))
    engine.add("short", [1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add("long", [3] * 40, SamplingParams(max_tokens=1))
    for _ in range(5):
        assert [(s.request_id, n) for s, n in engine.step().num_tokens.items()] == [("short", 1), ("long", 7)]


def test_preemption_takes_the_youngest_and_recomputes_the_same_tokens() -> None:
    engine = PaperEngine(16, limits())
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompts = {name: [i + 1] * 8 for i, name in enumerate(["oldest", "middle", "youngest"])}
    for name, prompt in prompts.items():
        engine.add(name, prompt, params)
    engine.run()
    assert engine.scheduler.counters.preemptions > 0
    assert list(engine.finished) == [("oldest", 0), ("middle", 0), ("youngest", 0)]
    for name, prompt in prompts.items():
        assert engine.tokens[name, 0] == continuation(prompt, params, 64)


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    engine = PaperEngine(64, limits())
    prompt = list(range(1, 22))
    for name in ("first", "second"):
        engine.add(name, prompt, SamplingParams(max_tokens=1))
        step = engine.step()
        engine.run()
        computed = sum(step.num_tokens.values())
        assert computed == (21 if name == "first" else 1)  # 5 full pages of 4 are found, the last token is computed


def test_without_prefix_caching_nothing_is_found() -> None:
    engine = PaperEngine(64, limits(prefix_caching=False))
    for name in ("first", "second"):
        engine.add(name, list(range(1, 22)), SamplingParams(max_tokens=1))
        assert sum(engine.step().num_tokens.values()) == 21
        engine.run()


def test_running_sequences_share_the_pages_of_a_common_prefix() -> None:
    engine = PaperEngine(64, limits())
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.add("first", [*range(1, 17), 40], params)
    engine.step()
    engine.add("second", [*range(1, 17), 41], params)
    engine.step()
    first, second = engine.scheduler.sequences()
    assert first.pages[:4] == second.pages[:4]
    assert first.pages[4] != second.pages[4]


def test_remembered_pages_give_way_least_recently_used_first() -> None:
    engine = PaperEngine(16, limits(max_model_len=64))
    for start in (1, 20):
        engine.add(str(start), list(range(start, start + 17)), SamplingParams(max_tokens=1))
        engine.run()
    engine.add("big", [45] * 40, SamplingParams(max_tokens=1))  # 10 pages: 8 were never used, 2 are taken back
    engine.run()
    for start, found in ((20, 16), (1, 4)):  # "20 again" itself took one more page of "1"
        engine.add(f"{start} again", list(range(start, start + 17)), SamplingParams(max_tokens=1))
        (sequence,) = engine.step().num_tokens
        assert sequence.num_cached_tokens == found
        engine.run()


def test_max_tokens_zero_computes_the_prompt_and_gives_no_token() -> None:
    engine = PaperEngine(64, limits())
    engine.add("a", [1, 2, 3], SamplingParams(max_tokens=0))
    engine.run()
    assert engine.tokens["a", 0] == []
    assert engine.finished["a", 0] == "length"
    assert engine.scheduler.counters.generated_tokens == 0


def test_a_sequence_that_fills_the_context_finishes_by_length() -> None:
    engine = PaperEngine(64, limits(max_model_len=32))
    engine.add("a", [1] * 30, SamplingParams(max_tokens=None, ignore_eos=True))
    engine.run()
    assert len(engine.tokens["a", 0]) == 2
    assert engine.finished["a", 0] == "length"


def test_overlap_preempts_nobody_whom_the_result_that_is_out_would_save() -> None:
    """As many preemptions as without, over many schedules in little memory."""
    counts = {False: 0, True: 0}
    for seed in range(40):
        random = Random(seed)
        requests = [(random.randrange(1, 20), random.randrange(1, 30)) for _ in range(8)]
        for overlap in counts:
            engine = PaperEngine(18, limits(), overlap=overlap)
            for number, (length, max_tokens) in enumerate(requests):
                params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
                engine.add(str(number), [number + 1] * length, params)
            engine.run()
            counts[overlap] += engine.scheduler.counters.preemptions
    assert counts[True] == counts[False] > 20


def test_overlap_goes_on_where_pages_suffice() -> None:
    engine = PaperEngine(64, limits(), overlap=True)
    engine.add("a", [1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    engine.step()
    engine.step()
    assert len(engine.steps) == 2 and len(engine.tokens["a", 0]) == 1


def test_a_sequence_whose_pending_token_is_its_last_by_length_is_not_computed_again() -> None:
    for params, max_model_len in (
        (SamplingParams(max_tokens=4, ignore_eos=True), 64),
        (SamplingParams(max_tokens=9), 7),
    ):
        engine = PaperEngine(64, limits(max_model_len=max_model_len), overlap=True)
        engine.add("a", [1, 2, 3], params)
        assert engine.run() == 4
        assert engine.finished["a", 0] == "length"
        assert engine.scheduler.counters.generated_tokens == 4


def test_a_stop_token_ends_a_sequence_once_it_has_its_least_tokens_and_eos_does_not_where_it_is_ignored() -> None:
    every = [token for token in range(VOCAB_SIZE) if token != EOS]
    for overlap in (False, True):
        for least in (0, 1, 5):
            engine = PaperEngine(64, limits(), overlap=overlap)
            params = SamplingParams(max_tokens=9, min_tokens=least, stop_token_ids=every, ignore_eos=True)
            engine.add("a", [1, 2, 3], params)
            engine.run()
            tokens = continuation([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True), 64)
            end = next(number for number in range(max(least, 1), 10) if tokens[number - 1] != EOS)
            assert (engine.tokens["a", 0], engine.finished["a", 0]) == (tokens[:end], "stop")


def test_decodes_that_go_on_have_the_very_same_list_and_others_another() -> None:
    """What is kept a sequence rests on it; a list never changes."""
    engine = PaperEngine(64, limits())
    for number in range(3):
        engine.add(str(number), [number + 1] * 3, SamplingParams(max_tokens=3 + 3 * number, ignore_eos=True))
    steps = [engine.step() for _ in range(9)]
    assert [len(step.sequences) for step in steps] == [3, 3, 3, 2, 2, 2, 1, 1, 1]
    same = [before.sequences is step.sequences for before, step in pairwise(steps)]
    assert same == [False, True, False, True, True, False, True, True]
