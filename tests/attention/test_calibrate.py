from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

from tessera.attention.calibrate import SAFE_LOG2, STEP, Calibration
from tessera.attention.contract import Shape
from tessera.errors import ConfigError

SHAPE = Shape(4, 2, 32, 32**-0.5, torch.float32, "cpu")


def constant_scores(value: float, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose every score is `value`."""
    return torch.full((tokens, 4, 32), value / 32**0.5), torch.ones(tokens, 2, 32)


def test_what_is_said_of_scores_is_what_a_plain_computation_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(300, heads, 32, generator=generator) for heads in (4, 2))
    calibration = Calibration([SHAPE], span=64)
    calibration.observe(0, q, k, [300])
    found = calibration.find(torch.float16)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * SHAPE.scale
    causal = torch.ones(300, 300).tril().bool()
    every = scores[:, causal].flatten().sort().values
    peaks = torch.stack([x.amax(-1) for x in torch.split(scores.masked_fill(~causal, -torch.inf), 64, -1)])
    peaks = peaks[peaks > -torch.inf]
    assert found.model.highest == pytest.approx(float(every[-1]), abs=1e-4)
    for share, value in found.model.quantiles.items():
        assert value == pytest.approx(float(every[round(share * (len(every) - 1))]), abs=2 * STEP)
    low, high = (found.phi + end * log(2) for end in SAFE_LOG2[torch.float16])
    share = float(((peaks >= low) & (peaks <= high)).float().mean())
    assert found.model.safe_share == pytest.approx(share, abs=0.02)
    assert 0.5 < share < 1  # so that it says something


def test_phi_is_where_the_most_rows_are_safe() -> None:
    calibration = Calibration([SHAPE, SHAPE])
    calibration.observe(0, *constant_scores(40.0, 30), [30])
    calibration.observe(1, *constant_scores(-300.0, 10), [10])
    for dtype, share in ((torch.float16, 0.75), (torch.bfloat16, 0.75)):
        found = calibration.find(dtype)
        low, high = (found.phi + end * log(2) for end in SAFE_LOG2[dtype])
        assert (low + high) / 2 == pytest.approx(40.0, abs=0.5)  # in the middle: as far from both ends as can be
        assert found.model.safe_share == share
        assert (found.layers[0].safe_share, found.layers[1].safe_share) == (1.0, 0.0)
        assert [found.layers[0].highest, found.layers[1].highest] == pytest.approx([40.0, -300.0])


def test_windows_soft_caps_and_the_ends_of_sequences_are_heeded() -> None:
    q, k = constant_scores(1.0, 60)
    k[:30] *= 100.0
    for shape, lens, highest, least_peak in (
        (SHAPE, [60], 100.0, 100.0),
        (SHAPE, [30, 30], 100.0, 1.0),  # the second sequence does not see the first
        (replace(SHAPE, window=10), [60], 100.0, 1.0),  # nor do the last tokens see the first
        (replace(SHAPE, soft_cap=5.0), [60], 5.0, 5.0),
    ):
        calibration = Calibration([shape])
        calibration.observe(0, q, k, lens)
        found = calibration.find(torch.float32).model
        assert found.highest == pytest.approx(highest, abs=1e-3)
        assert found.peak_quantiles[0.01] == pytest.approx(least_peak, abs=STEP)


def test_a_calibration_without_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match="no score was observed"):
        Calibration([SHAPE]).find(torch.float16)


def test_a_token_sees_none_after_it() -> None:
    q, k = constant_scores(1.0, 60)
    k[2:] *= 100.0
    calibration = Calibration([SHAPE])
    calibration.observe(0, q[:4], k[:4], [4])
    peaks = calibration.find(torch.float32).model.peak_quantiles
    assert (peaks[0.5], peaks[0.99]) == (1.0, 100.0)  # two of four rows see no large score
