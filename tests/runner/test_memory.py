"""Memory: what does not fit is refused with the numbers."""

from __future__ import annotations

import pytest
import torch

from tessera.errors import CapacityError
from tessera.runner.memory import check_pages_fit, check_weights_fit, free_memory_bytes, num_pages_that_fit

CPU = torch.device("cpu")


def test_weights_larger_than_memory_are_refused_with_needed_and_free() -> None:
    free = free_memory_bytes(CPU)
    assert free > 2**20
    check_weights_fit(free // 4, CPU, 0.5)
    with pytest.raises(CapacityError, match=r"the weights need [\d.]+ GiB, [\d.]+ [GM]iB of RAM may be used") as caught:
        check_weights_fit(free, CPU, 0.5)
    assert "free some memory" in str(caught.value.hint)


def test_pages_fill_the_share_but_no_more_than_can_be_used() -> None:
    assert num_pages_that_fit(1000, 10, max_useful=500, max_model_len=16, page_size=16) == 100
    assert num_pages_that_fit(1000, 10, max_useful=50, max_model_len=16, page_size=16) == 50


def test_a_sequence_that_does_not_fit_is_refused_with_a_length_that_would() -> None:
    with pytest.raises(CapacityError, match="one sequence of 2000 tokens needs") as caught:
        num_pages_that_fit(100 * 2**20, 2**20, max_useful=10_000, max_model_len=2000, page_size=16)
    assert "--max-model-len 1600" in str(caught.value.hint)


def test_pages_asked_for_by_number_are_refused_where_they_do_not_fit() -> None:
    with pytest.raises(CapacityError, match=r"2000000000 pages need [\d.]+ GiB, [\d.]+ GiB are free"):
        check_pages_fit(2_000_000_000 * 2**20, 2_000_000_000, CPU)
