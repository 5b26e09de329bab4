"""The hint of a refusal: what mends it, one way, and nothing that would not help."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from plug_ins import SHAPE, DecodeOnly, Picky, config, register_third_party
from tessera.attention import choose as choosing
from tessera.attention.choose import build_attention, choose
from tessera.attention.contract import Limits, Phase, Shape
from tessera.errors import BackendError


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    register_third_party(monkeypatch)


@pytest.fixture(autouse=True)
def order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed order without those that are installed on some machines only."""
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("triton", "torch_sdpa", "naive")))


def test_named_backend_that_cannot_serve_is_refused_with_every_reason_and_a_way_out() -> None:
    shape = replace(SHAPE, head_dim=40, window=128, page_size=16)
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "picky", [shape])
    message, hint = str(caught.value).split("\n\n")
    assert message == (
        "picky cannot serve decode: page_size 16 not in (64, 256); head_dim 40 not in (32, 64); "
        "no sliding window, the model has one of 128"
    )
    assert hint == "hint: use --decode-attention torch_sdpa"


def test_page_size_is_the_first_hint_where_it_alone_is_in_the_way() -> None:
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "picky", [replace(SHAPE, page_size=16)])
    assert str(caught.value) == (
        "picky cannot serve decode: page_size 16 not in (64, 256)\n\n"
        "hint: use --page-size 64 or --decode-attention torch_sdpa"
    )


def test_missing_wheel_is_refused_with_what_installs_it() -> None:
    with pytest.raises(BackendError, match="decode_only cannot serve decode: no_such_module_of_ours is not") as caught:
        choose(Phase.DECODE, "decode_only", [SHAPE])
    assert caught.value.hint == "pip install no-such-wheel, or use --decode-attention torch_sdpa"


def test_what_would_not_help_is_not_offered_for_installation() -> None:
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "decode_only", [replace(SHAPE, dtype=torch.float16)])
    assert caught.value.hint == "use --decode-attention torch_sdpa"


def test_both_phases_reasons_are_told_at_once_and_one_way_out() -> None:
    with pytest.raises(BackendError) as caught:
        build_attention(config(attention="picky"), [replace(SHAPE, dtype=torch.float16)], None)
    message, hint = str(caught.value).split("\n\n")
    assert message.splitlines() == [
        "picky cannot serve prefill: dtype torch.float16 not in (torch.bfloat16,)",
        "picky cannot serve decode: dtype torch.float16 not in (torch.float32,)",
    ]
    assert hint == "hint: use --attention torch_sdpa"


def hint(shape: Shape = SHAPE, page_size: int | None = None, **names: str) -> str | None:
    with pytest.raises(BackendError) as caught:
        build_attention(config(**names), [shape], page_size)
    return caught.value.hint


def test_a_backend_of_one_phase_is_offered_for_that_phase_in_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeOnly, "needs", ())
    assert hint(attention="decode_only") == "use --decode-attention decode_only in place of --attention"
    assert hint(prefill_attention="decode_only") == "use --prefill-attention torch_sdpa"
    monkeypatch.setattr(Picky, "limits", {Phase.PREFILL: Limits((torch.float32,), page_sizes=(64,), devices=("cpu",))})
    assert hint(attention="picky") == "use --prefill-attention picky in place of --attention"


def test_a_flag_of_one_phase_is_mended_by_that_flag() -> None:
    half = replace(SHAPE, dtype=torch.float16)
    assert hint(half, prefill_attention="picky") == "use --prefill-attention torch_sdpa"
    both = hint(half, prefill_attention="picky", decode_attention="picky")
    assert both == "use --prefill-attention torch_sdpa --decode-attention torch_sdpa"
    each = hint(half, prefill_attention="picky", decode_attention="decode_only")
    assert each == "use --prefill-attention torch_sdpa; use --decode-attention torch_sdpa"
    assert hint(half, attention="picky", decode_attention="naive") == "use --prefill-attention torch_sdpa"


class Wheel(DecodeOnly):
    """Not installed; both phases, pages of 256."""

    limits: ClassVar[dict[Phase, Limits]] = dict.fromkeys(
        Phase, Limits((torch.float32,), page_sizes=(256,), devices=("cpu",))
    )


@pytest.mark.parametrize(
    ("limits", "page_size", "device", "said"),
    [
        (Wheel.limits, None, "cpu", "pip install no-such-wheel, or use --attention torch_sdpa"),
        (Wheel.limits, 256, "cpu", "pip install no-such-wheel, or use --attention torch_sdpa"),
        (Wheel.limits, 16, "cpu", "pip install no-such-wheel and use --page-size 256, or use --attention torch_sdpa"),
        (Wheel.limits, None, "meta", None),
        (Wheel.limits, 16, "meta", None),
        (
            DecodeOnly.limits,
            None,
            "cpu",
            "pip install no-such-wheel and use --decode-attention decode_only in place of --attention, "
            "or use --attention torch_sdpa",
        ),
        (DecodeOnly.limits, None, "meta", None),
    ],
)
def test_installing_is_offered_where_it_helps_and_with_what_else_it_takes(
    monkeypatch: pytest.MonkeyPatch, limits: dict[Phase, Limits], page_size: int | None, device: str, said: str | None
) -> None:
    monkeypatch.setattr(DecodeOnly, "limits", limits)
    assert hint(replace(SHAPE, device_type=device), page_size, attention="decode_only") == said
