"""Where fused kernels serve: on a GPU that is new enough, and on which one of them has run."""

from __future__ import annotations

import logging

import pytest
import torch

from tessera.kernels import fused


@pytest.mark.parametrize(
    ("capability", "problem", "expected"),
    [((7, 5), None, False), ((8, 0), None, True), ((9, 0), None, True), ((9, 0), "no C compiler", False)],
)
def test_cuda_is_fused_where_a_kernel_has_run(
    capability: tuple[int, int], problem: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(fused, "launch_problem", lambda _: problem)
    assert fused.fused_on(torch.device("cuda")) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may run here")
def test_a_kernel_that_cannot_run_is_a_warning_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    fused.launch_problem.cache_clear()
    with caplog.at_level(logging.WARNING, "tessera"):
        problem = fused.launch_problem(torch.device("cuda"))
    assert problem and problem in caplog.text
