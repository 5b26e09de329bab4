"""Accuracy figures are right: none for the reference itself, some for a coarser type, perplexity as elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from hf_reference import default_model_reference
from tessera import cli
from tessera.bench.quality.metrics import compare, paired_p_value, perplexity
from tessera.bench.quality.model import Answer, QualityModel
from tessera.bench.quality.text import read_text, windows
from tessera.bench.record import read
from tessera.config import EngineConfig, ModelConfig
from tessera.errors import ConfigError
from tessera.model.layers.linear import packs
from tessera.model.source import find_model
from tessera.text.tokenizer import load_tokenizer


def test_naive_is_its_own_reference_and_bfloat16_differs(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    flags = f"--model {tiny_model} --load-format dummy --cpu-threads 1 --out {out}"
    flags += " --prompts 3 --tokens 3 --window 24 --windows 2 --backends naive,flashinfer:fa2,flashinfer:cuda_cores"
    assert cli.main(["bench", "quality", *flags.split(), "--dtypes", "float32,bfloat16"]) == 0
    exact, _, _, coarse, _, _ = rows = read(out)
    assert [row.status for row in rows] == ["ok", "unavailable", "unavailable"] * 2
    for name in ("kl_mean", "kl_max", "max_logit_error", "nll_difference"):
        assert exact.metrics[name] == 0 < abs(coarse.metrics[name]), name
    for name in ("greedy_agreement_led", "greedy_agreement_free", "equal_answers", "nll_p_value"):
        assert exact.metrics[name] == 1, name
    assert coarse.metrics["kl_max"] < 0.2 and {proof.backend for proof in coarse.subject.proofs} == {"naive"}
    said = capsys.readouterr().out
    assert "perplexity" in said and "flashinfer:fa2 unavailable: prefill: flashinfer is not installed" in said


@pytest.mark.skipif(
    not packs(torch.bfloat16, torch.device("cpu")), reason="this processor does not compute in bfloat16"
)
def test_few_sequences_are_decoded_at_a_time_where_that_is_asked() -> None:
    """For few are multiplied by other weights; so are nine in steps of at most eight, the ninth alone."""
    settings = {"dtype": "bfloat16", "attention": "torch_sdpa", "num_pages": 40}
    model = QualityModel(EngineConfig.from_flat(settings), 9, 64)
    prompts = [[100 + n, 200, 300] for n in range(9)]
    led_by = torch.full((9, 2), 400)
    all_at_once, eight, nine = (model.answer(prompts, 2, led_by, decode_batch=size) for size in (None, 8, 9))
    assert torch.equal(all_at_once.logits[0], eight.logits[0]), "prompts stand alone whatever is asked"
    assert torch.equal(all_at_once.logits[1], nine.logits[1]) and model.num_four_bit_layers == 120
    off = (all_at_once.logits[1] - eight.logits[1]).abs().amax(-1)
    assert len(off) == 9 and (off > 0).all() and off.max() < 2


def test_what_multiplies_steps_of_few_is_in_the_row_and_is_not_asked_of_the_reference(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    flags = f"--prompts 2 --tokens 2 --window 24 --windows 1 --cpu-threads 1 --out {out} --backends naive"
    flags += " --cpu-four-bits --decode-batch 1 --dtypes bfloat16,float32"
    cli.main(["bench", "quality", *flags.split()])
    bfloat16, float32 = read(out)
    assert float32.status == "failed" and "the dtype is float32" in float32.reason
    if packs(torch.bfloat16, torch.device("cpu")):
        assert bfloat16.status == "ok" and bfloat16.conditions.settings["num_four_bit_layers"] == 120
    assert bfloat16.case["decode_batch"] == 1


def test_perplexity_is_that_of_transformers_on_the_same_weights(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    flags = f"--prompts 1 --tokens 1 --window 24 --windows 2 --cpu-threads 1 --out {out}"
    assert cli.main(["bench", "quality", "--backends", "naive", "--dtypes", "float32", *flags.split()]) == 0
    (exact,) = read(out)
    assert exact.metrics["perplexity"] == pytest.approx(_perplexity_of_transformers(24, 2), rel=1e-4)
    losses = [loss for n in range(2) for loss in exact.samples[f"nll_window_{n}"]]
    assert len(losses) == 2 * 23 and math.exp(sum(losses) / 46) == pytest.approx(exact.metrics["perplexity"], rel=1e-4)


def _perplexity_of_transformers(length: int, count: int) -> float:
    source = find_model(ModelConfig())
    ids = windows(load_tokenizer(source, ModelConfig()).encode(read_text(None)[1]), length, count)
    model, batch = default_model_reference(), torch.tensor(ids)
    with torch.inference_mode():
        return math.exp(float(model(batch, labels=batch).loss))


def test_divergence_and_agreement_are_those_of_the_definition() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    reference = Answer(torch.tensor([[0]]), [p.log()])
    other = Answer(torch.tensor([[1]]), [q.log()])
    found = compare(other, other, reference)
    assert found["kl_mean"] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert found["max_logit_error"] == pytest.approx(math.log(2))
    assert found["greedy_agreement_led"] == found["greedy_agreement_free"] == found["equal_answers"] == 0


def test_paired_tests_are_mcnemar_for_scores_and_t_for_others() -> None:
    ours, theirs = [1.0] * 5 + [0.0] + [1.0] * 20, [0.0] * 5 + [1.0] + [1.0] * 20
    assert paired_p_value(ours, theirs) == pytest.approx(stats.binomtest(5, 6).pvalue) == pytest.approx(0.21875)
    a, b = [1.5, 2.5, 3.1, 4.0], [1.0, 2.6, 2.9, 3.2]
    assert paired_p_value(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired_p_value(a, a) == paired_p_value([1.0], [2.0]) == 1 and paired_p_value([2.5, 3.5], [1.5, 2.5]) == 0


def test_a_perplexity_of_one_window_has_no_test() -> None:
    losses = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    found = perplexity(losses, losses)
    assert found["perplexity"] == pytest.approx(math.exp(2)) and "nll_p_value" not in found


def test_windows_do_not_overlap_and_a_short_text_is_refused() -> None:
    assert windows(list(range(7)), 3, 2) == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match="7 tokens, 3 windows of 3 need 9"):
        windows(list(range(7)), 3, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dtypes float8", "which is no type"),
        ("--dtypes float32,float32", "twice"),
        ("--dtype float32", "decided by this benchmark"),
        ("--decode-attention naive", "decided by this benchmark"),
        ("--repeats 3", "unknown flag"),
        ("--text /no/such/file", "cannot be read"),
        ("--window 1", "window must be"),
        ("--windows 0", "windows must be"),
        ("--windows 90000", "windows of 512 need"),
        ("--window 9000 --windows 1", "needs 9000 tokens a sequence"),
        ("--prompts 0", "prompts must be"),
        ("--tokens 0", "tokens must be"),
        ("--limit 3", "for tasks of lm-eval"),
        ("--max-num-seqs 3", "for tasks of lm-eval"),
        ("--no-enable-prefix-caching", "for tasks of lm-eval"),
        ("--lm-eval-path .", "for tasks of lm-eval"),
        ("--lm-eval-transformers", "for tasks of lm-eval"),
        ("--lm-eval-python python3", "for tasks of lm-eval"),
        ("--lm-eval x --limit 0", "limit must be"),
        ("--lm-eval x --prompts 3", "means nothing to tasks"),
        ("--lm-eval x --lm-eval-path /no/such", "is no folder"),
        ("--lm-eval x --lm-eval-python /no/such", "cannot be run"),
        ("--lm-eval x --lm-eval-python /usr/bin/false", "lm-eval is not installed for"),
        ("--lm-eval ,", "names no task"),
        ("--out rows.json", "does not end in .jsonl"),
        ("--out /proc/none/rows.jsonl --dtypes float8", "--out /proc/none/rows.jsonl cannot be written"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_a_hint(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "quality", "--backends", "naive", *flags.split()]) == 2
    said = capsys.readouterr().err
    assert words in said and "\nhint: " in said and "Traceback" not in said


def test_a_text_of_ones_own_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("größer", encoding="utf-8")
    assert read_text(str(tmp_path / "own.txt")) == ("own.txt", "größer")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(str(tmp_path / "bad.txt"))
