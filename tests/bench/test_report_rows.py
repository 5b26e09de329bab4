"""Which rows a report compares, and what a sceptic would ask about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from synthetic_rows import GPU, LAPTOP, lost, offline, online, subject, where
from tessera.bench.record import Record
from tessera.bench.report.build import build
from tessera.bench.report.page import markdown
from tessera.bench.report.rows import arrange

DECODE = "flashinfer:tensor_cores"
NAIVE, FLASH = subject("naive", DECODE), subject("flash_attn:4", DECODE)


def said(records: Sequence[Record], baseline: str | None = None) -> str:
    return "\n".join(build(records, baseline=baseline).verdict)


def caveats_of(records: Sequence[Record]) -> str:
    text = markdown(build(records))
    return text.partition("## Caveats")[2].partition("\n## ")[0]


def test_rows_of_two_machines_are_never_compared() -> None:
    records = offline({"naive": 3000}, at=where(GPU)) + offline({"triton": 9000}, at=where(LAPTOP))
    text = said(records)
    assert "faster" not in text and text.count("There is nothing to compare it with") == 2
    assert "Rows of 2 machines" in caveats_of(records)


def test_rows_of_two_commits_or_commands_are_never_compared() -> None:
    for other in (where(commit="fff"), where(command="tessera bench offline --max-model-len 9")):
        records = offline({"naive": 3000}, at=where()) + offline({"triton": 9000}, at=other)
        assert "faster" not in said(records) and "each is judged by itself" in caveats_of(records)


def test_a_run_that_was_resumed_is_one() -> None:
    first, second = resumed()
    assert "4 repeats" in said([*first, *(each for each in second if each.repeat > 1)])
    assert len(arrange([*first, *second]).sessions) == 1
    assert "8 of 12 offline rows come of a run that was interrupted" in caveats_of([*first, *second])
    assert "interrupted" not in caveats_of(first)


def test_repeats_that_were_not_measured_side_by_side_are_no_pair() -> None:
    first, second = resumed()
    cut = [*first[:3], *(each for each in second if each.repeat > 1 or each.subject.label == "triton")]
    alone = [*first[:3], *(each for each in second if each.repeat == 1 and each.subject.label == "triton")]
    assert "3 repeats" in said([each for each in cut if (each.provenance.run, each.repeat) != ("r2", 0)])
    assert "1 repeat cannot tell" in said(alone)


def resumed() -> tuple[list[Record], list[Record]]:
    """Two repeats of a run, and four of one that continues it, under another command."""
    at = replace(where(run="r2", command="tessera bench offline --resume"), continues="r1")
    speeds = {"naive": 3000.0, "triton": 4000.0}
    return offline(speeds, 2, at=where()), offline(speeds, 4, at=at)


def test_the_failure_of_another_run_is_not_forgotten() -> None:
    records = offline({"naive": 3000, "triton": 4000})
    bad = lost("offline", subject("naive"), "out of memory", repeat=0)
    other = replace(bad, provenance=replace(bad.provenance, run="r0"))
    typed = replace(bad, conditions=replace(records[0].conditions, dtype="float32"))
    assert len(arrange([bad, *records]).lost) == 0 and len(arrange([other, *records]).lost) == 1
    assert len(arrange([typed, *records]).lost) == 1
    continued = replace(records[0], provenance=replace(records[0].provenance, run="r7", continues="r0"))
    assert len(arrange([other, continued]).lost) == 0


def test_a_server_whose_device_is_not_known_is_compared_with_ours() -> None:
    records = offline({"naive": 3000, "triton": 4000})
    told = [replace(each, conditions=replace(each.conditions, device="")) for each in records if each.repeat % 2]
    (session,) = arrange([*(each for each in records if not each.repeat % 2), *told]).sessions
    assert session.device == "cuda" and len(session.rows) == 10


def test_a_row_that_failed_and_was_run_again_counts_once() -> None:
    records = offline({"naive": 3000, "triton": 4000}, at=where(command="tessera bench offline --repeats 5"))
    again = lost("offline", subject("naive"), "out of memory", repeat=0)
    assert "10/10 succeeded" in build([again, *records]).subtitle


def test_a_label_in_two_types_is_two_subjects() -> None:
    single = [
        replace(each, conditions=replace(each.conditions, dtype="float32")) for each in offline({"naive": 1000}, seed=2)
    ]
    text = said(offline({"naive": 3000}) + single)
    assert "naive [bfloat16] is" in text and "naive [float32]" in text and "ran in different types" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda each: replace(
                each,
                metrics=each.metrics | {"client_cpu": 0.97},
                subject=replace(each.subject, note="the client was the bottleneck: it used 97% of a core"),
            ),
            "The client may have been the bottleneck in 48 of 48 online rows: it used up to 97% of a core.",
        ),
        (
            lambda each: replace(each, provenance=replace(each.provenance, commit="abc+changes")),
            "changes that are not committed",
        ),
        (lambda each: replace(each, conditions=replace(each.conditions, cache="not recorded")), "was not recorded"),
        (
            lambda each: replace(each, subject=subject("triton", symbols={"triton": "triton_interpreted::fa1_kernel"})),
            "triton ran in Triton's interpreter: those times say nothing of a GPU.",
        ),
        (lambda each: replace(each, conditions=replace(each.conditions, warmup="none")), "had no warm-up"),
        (
            lambda each: replace(each, metrics=each.metrics | {"cached_prompt_share": 0.4}),
            "Up to 40% of the prompt tokens",
        ),
        (
            lambda each: replace(each, conditions=replace(each.conditions, cache="warm" if each.repeat else "cold")),
            "was cold in some and warm in other",
        ),
        (
            lambda each: replace(each, metrics={k: v * 1.1**each.repeat for k, v in each.metrics.items()}),
            "The machine drifted by",
        ),
    ],
)
def test_what_a_sceptic_would_ask_is_found_in_the_rows(change: object, words: str) -> None:
    assert callable(change)
    records = online([(NAIVE, 160, 11), (FLASH, 95, 11)], repeats=6)
    assert words not in caveats_of(records) and words in caveats_of([change(each) for each in records])


def test_few_repeats_are_a_caveat() -> None:
    assert "have 1 repeat:" in caveats_of(offline({"naive": 3000}, 1)) and "only large" in caveats_of(
        offline({"naive": 3000}, 3)
    )
    assert "repeat" not in caveats_of(offline({"naive": 3000}, 5))
