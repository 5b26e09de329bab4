from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tessera.kernels.pages import gather_pages, write_pages

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
every_device = pytest.mark.parametrize("device", DEVICES)


def make_pools(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k_pages, v_pages = torch.randn(2, 5, 4, 2, 8).to(device, dtype).unbind(0)
    return k_pages.clone(), v_pages.clone()


def expected(pages: Tensor, slots: list[int], values: Tensor) -> Tensor:
    flat = pages.clone().flatten(0, 1)
    for slot, value in zip(slots, values):
        if slot >= 0:
            flat[slot] = value
    return flat.view_as(pages)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [[7, 0, 19, 3], [11]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_write_fills_its_slots_and_no_other(device: str, dtype: torch.dtype, slots: list[int], padded: bool) -> None:
    k_pages, v_pages = make_pools(device, dtype)
    k, v = torch.randn(2, len(slots), 2, 8).to(device, dtype).unbind(0)
    wanted = expected(k_pages, slots, k), expected(v_pages, slots, v)
    write_pages(k, v, k_pages, v_pages, torch.tensor(slots, dtype=torch.int64, device=device), padded=padded)
    assert torch.equal(k_pages, wanted[0])
    assert torch.equal(v_pages, wanted[1])


@every_device
@pytest.mark.parametrize("slots", [[7, -1, 0, -1], [-1, 0], [-1, 19, -5], [-1, -1], [-1]], ids=str)
def test_padding_is_skipped_and_its_values_go_nowhere(device: str, slots: list[int]) -> None:
    k_pages, v_pages = make_pools(device)
    k, v = torch.randn(2, len(slots), 2, 8, device=device).unbind(0)
    k[torch.tensor(slots) < 0] = torch.nan
    wanted = expected(k_pages, slots, k), expected(v_pages, slots, v)
    write_pages(k, v, k_pages, v_pages, torch.tensor(slots, device=device), padded=True)
    assert torch.equal(k_pages, wanted[0])
    assert torch.equal(v_pages, wanted[1])


def test_write_takes_strided_values() -> None:
    """Keys and values are slices of one fused projection."""
    k_pages, v_pages = make_pools("cpu")
    fused = torch.randn(3, 4, 8)
    write_pages(fused[:, :2], fused[:, 2:], k_pages, v_pages, torch.tensor([4, 5, 18]))
    assert torch.equal(k_pages.flatten(0, 1)[[4, 5, 18]], fused[:, :2])
    assert torch.equal(v_pages.flatten(0, 1)[[4, 5, 18]], fused[:, 2:])


def test_unannounced_padding_is_an_error_on_a_cpu() -> None:
    k_pages, v_pages = make_pools("cpu")
    k = torch.randn(2, 2, 8)
    with pytest.raises(IndexError):
        write_pages(k, k, k_pages, v_pages, torch.tensor([3, -1]))


@every_device
def test_gather_lays_pages_one_behind_the_other(device: str) -> None:
    pages, _ = make_pools(device)
    ids = torch.tensor([3, 0, 3, 4], device=device)
    wanted = torch.cat([pages[i] for i in (3, 0, 3, 4)])
    assert torch.equal(gather_pages(pages, ids), wanted)
    out = torch.full((4, 4, 2, 8), torch.nan, device=device)
    gathered = gather_pages(pages, ids, out)
    assert torch.equal(gathered, wanted)
    assert gathered.data_ptr() == out.data_ptr()
