"""Which backend serves a phase, named or by the fixed order, and the page size that the phases share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plug_ins import SHAPE, Picky, config, register_third_party
from tessera.attention import choose as choosing
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.choose import AUTO, build_attention, choose
from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import BACKENDS
from tessera.errors import BackendError, ConfigError

DOCS = Path(__file__).parent.parent.parent / "docs" / "BACKENDS.md"
HUGE_HEAD = replace(SHAPE, head_dim=2048)
"""No backend takes heads of more than 1024."""


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    register_third_party(monkeypatch)


@pytest.fixture(autouse=True)
def order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed order without those that are installed on some machines only."""
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("triton", "torch_sdpa", "naive")))


def test_auto_takes_the_first_that_can_serve_and_says_why_the_others_lost() -> None:
    for phase in Phase:
        backend, choice = choose(phase, "auto", [registry.shape_in(phase, SHAPE)])
        assert backend is TorchSdpa
        assert (choice.phase, choice.backend) == (phase, "torch_sdpa")
        assert choice.rejected.keys() == {"triton", "naive"}
        assert "device cpu not in ('cuda',)" in choice.rejected["triton"]


def test_auto_passes_over_a_backend_with_a_reason_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("decode_only", "naive")))
    backend, choice = choose(Phase.PREFILL, "auto", [SHAPE])
    assert backend is Naive
    assert choice.rejected == {"decode_only": ["no prefill kernel"]}


def test_the_fixed_order_holds_names_that_there_are() -> None:
    assert AUTO.keys() == set(Phase)
    assert all(name in BACKENDS for names in AUTO.values() for name in names)


def test_auto_on_a_cpu_prefers_those_whose_answers_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among ours whatever is faster; a variant does not stand beside the library that picks by itself."""
    steady = {phase: replace(limits, batch_invariant=("cpu",)) for phase, limits in TorchSdpa.limits.items()}
    monkeypatch.setattr(TorchSdpa, "limits", steady)
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("naive", "torch_sdpa:flash", "torch_sdpa")))
    backend, choice = choose(Phase.DECODE, "auto", [SHAPE])
    assert backend is TorchSdpa
    assert choice.rejected["naive"] == ["does not promise the same bits whatever else is in the batch"]
    assert "torch_sdpa:flash" in choice.rejected


def test_auto_with_nothing_usable_lists_every_reason_of_every_backend() -> None:
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "auto", [HUGE_HEAD])
    for name in ("torch_sdpa", "naive"):
        assert f"{name} cannot serve decode: head_dim 2048 not in range(1, 1025)" in str(caught.value)


def test_named_backend_is_used() -> None:
    for name, backend in (("naive", Naive), ("torch_sdpa", TorchSdpa), ("picky", Picky)):
        chosen, choice = choose(Phase.DECODE, name, [SHAPE])
        assert chosen is backend
        assert choice.backend == name
        assert choice.rejected == {}


def test_reasons_of_all_layers_count() -> None:
    with pytest.raises(BackendError, match="no sliding window, the model has one of 64"):
        choose(Phase.DECODE, "picky", [SHAPE, replace(SHAPE, window=64)])


def test_vision_is_refused_for_a_model_that_takes_no_images() -> None:
    with pytest.raises(ConfigError, match="--vision-attention naive was asked, the model has no vision tower"):
        build_attention(config(vision_attention="naive"), [SHAPE], None)
    build_attention(config(vision_attention="auto"), [SHAPE], None)


def test_the_fixed_order_searches_for_no_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("auto searched the installed packages"))
    build_attention(config(), [SHAPE], None)


def test_page_size_is_the_smallest_that_both_phases_take() -> None:
    def page_size(wanted: int | None = None, **names: str) -> int:
        return build_attention(config(**names), [SHAPE], wanted)[1]

    assert page_size() == 16
    assert page_size(decode_attention="picky") == 64
    assert page_size(256, decode_attention="picky") == 256
    assert page_size(7, attention="naive") == 7


@pytest.mark.parametrize("wanted", [16, 128])
def test_page_size_that_a_phase_refuses_is_an_error(wanted: int) -> None:
    with pytest.raises(BackendError, match=rf"picky cannot serve decode: page_size {wanted} not in \(64, 256\)"):
        build_attention(config(decode_attention="picky"), [SHAPE], wanted)


def test_phases_without_a_common_page_size_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {phase: replace(limits, page_sizes=range(1, 33)) for phase, limits in Naive.limits.items()}
    monkeypatch.setattr(Naive, "limits", small)
    with pytest.raises(BackendError, match=r"naive takes range\(1, 33\) for prefill; picky takes \(64, 256\)"):
        build_attention(config(prefill_attention="naive", decode_attention="picky"), [SHAPE], None)


@pytest.mark.parametrize(
    ("names", "prefill", "decode"),
    [
        ({}, "torch_sdpa", "torch_sdpa"),
        ({"attention": "naive"}, "naive", "naive"),
        ({"attention": "naive", "decode_attention": "torch_sdpa"}, "naive", "torch_sdpa"),
        ({"prefill_attention": "naive"}, "naive", "torch_sdpa"),
        ({"attention": "naive", "prefill_attention": "auto"}, "torch_sdpa", "naive"),
        ({"decode_attention": "picky"}, "torch_sdpa", "picky"),
    ],
)
def test_phase_flag_overrides_the_general_one(names: dict[str, str], prefill: str, decode: str) -> None:
    attention, _, choices = build_attention(config(**names), [SHAPE, SHAPE], None)
    assert {choice.phase: choice.backend for choice in choices} == {"prefill": prefill, "decode": decode}
    bound: dict[Phase, Any] = attention._backends
    assert [bound[phase][0].name for phase in (Phase.PREFILL, Phase.DECODE)] == [prefill, decode]


def test_layers_of_one_shape_share_a_backend_with_the_chosen_page_size() -> None:
    shapes: list[Shape] = [SHAPE, replace(SHAPE, window=8), SHAPE, replace(SHAPE, window=8), replace(SHAPE, window=9)]
    attention, page_size, _ = build_attention(config(), shapes, None)
    assert page_size == 16
    assert attention._layer_groups == (0, 1, 0, 1, 2)
    for of_phase in attention._backends.values():
        assert [backend.shape for backend in of_phase] == [
            replace(SHAPE, page_size=16, window=window) for window in (None, 8, 9)
        ]


def test_users_page_size_is_kept_or_refused() -> None:
    assert build_attention(config(), [SHAPE], 5)[1] == 5
    with pytest.raises(BackendError, match=r"page_size 32 not in \(64, 256\)"):
        build_attention(config(decode_attention="picky"), [SHAPE], 32)


@pytest.mark.parametrize("name", ["torch_sdpa:flash", "torch_sdpa:cudnn"])
def test_a_type_that_torch_has_no_kernel_for_on_cuda_is_refused_without_a_trial_and_in_the_docs(name: str) -> None:
    on_cuda = replace(SHAPE, device_type="cuda", capability=(9, 0))
    for phase in Phase:
        (reason,) = registry.reasons_against(name, phase, [registry.shape_in(phase, on_cuda)])
        assert reason.startswith("dtype torch.float32 not in (torch.bfloat16, torch.float16)")
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(f"| `{name}` | float")]
    assert len(rows) == 3 and all("float16, bfloat16 only" in row or "float32" not in row for row in rows)
