"""Memory: what does not fit is refused with the numbers."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_memory_that_a_step_frees_is_kept_for_the_next_one() -> None:
    """Counted in page faults: without it, every one of 20 tensors of 64 MiB is cleared by the system again."""
    script = textwrap.dedent(
        """
        import resource, torch
        from tessera.runner.memory import keep_freed_memory
        assert keep_freed_memory()
        def touch():
            torch.ones(16 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            before = touch()  # the first few find the heap's end taken by something small
        for _ in range(20):
            after = touch()
        print(after - before)
        """
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 1000
