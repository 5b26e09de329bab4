from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from attention_workloads import make_shape
from tessera.attention import choose as registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.choose import BACKENDS, backend_rows, build_attention, choose, choose_page_size
from tessera.attention.contract import Limits, Phase, Shape, import_error
from tessera.config import AttentionConfig
from tessera.errors import BackendError, ConfigError

SHAPE = make_shape(page_size=None)
HUGE_HEAD = replace(SHAPE, head_dim=2048)
"""No backend takes heads of more than 1024."""


class Picky(Naive):
    """Decodes on pages of 64 or 256 tokens, prefills bfloat16 only, and knows no windows."""

    name: ClassVar[str] = "picky"
    limits: ClassVar[dict[Phase, Limits]] = {
        Phase.DECODE: Limits((torch.float32,), head_dims=(32, 64), page_sizes=(64, 256), devices=("cpu",)),
        Phase.PREFILL: Limits((torch.bfloat16,), devices=("cpu",)),
    }


class DecodeOnly(Naive):
    name: ClassVar[str] = "decode_only"
    needs: ClassVar[tuple[str, ...]] = ("no_such_module_of_ours",)
    limits: ClassVar[dict[Phase, Limits]] = {Phase.DECODE: Limits((torch.float32,), devices=("cpu",))}


@pytest.fixture(autouse=True)
def third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside tessera that registers backends, one of which is broken and one not a backend."""
    module = ModuleType("third_party_attention")
    for name, value in {"Picky": Picky, "DecodeOnly": DecodeOnly, "Wrong": dict}.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "third_party_attention", module)
    register(
        monkeypatch,
        picky="third_party_attention:Picky",
        decode_only="third_party_attention:DecodeOnly",
        wrong="third_party_attention:Wrong",
        broken="no_such_package.attention:Backend",
    )


def register(monkeypatch: pytest.MonkeyPatch, **paths: str) -> None:
    points = EntryPoints(EntryPoint(name, path, "tessera.attention") for name, path in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


def config(**names: str) -> AttentionConfig:
    return AttentionConfig(**names)


def test_auto_takes_the_first_that_can_serve_and_says_why_the_others_lost() -> None:
    for phase in Phase:
        backend, choice = choose(phase, "auto", [SHAPE])
        assert backend is TorchSdpa
        assert (choice.phase, choice.backend) == (phase, "torch_sdpa")
        assert choice.rejected == {"naive": ["torch_sdpa stands before it"]}


def test_auto_passes_over_a_backend_with_a_reason_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AUTO", dict.fromkeys(Phase, ("decode_only", "naive")))
    backend, choice = choose(Phase.PREFILL, "auto", [SHAPE])
    assert backend is Naive
    assert choice.rejected == {"decode_only": ["no prefill kernel"]}


def test_auto_with_nothing_usable_lists_every_reason_of_every_backend() -> None:
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "auto", [HUGE_HEAD])
    for name in BACKENDS:
        assert f"{name} cannot serve decode: head_dim 2048 not in range(1, 1025)" in str(caught.value)


def test_named_backend_is_used() -> None:
    for name, backend in (("naive", Naive), ("torch_sdpa", TorchSdpa), ("picky", Picky)):
        chosen, choice = choose(Phase.DECODE, name, [SHAPE])
        assert chosen is backend
        assert choice.backend == name
        assert choice.rejected == {}


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


def test_reasons_of_all_layers_count() -> None:
    with pytest.raises(BackendError, match="no sliding window, the model has one of 64"):
        choose(Phase.DECODE, "picky", [SHAPE, replace(SHAPE, window=64)])


@pytest.mark.parametrize(("name", "near"), [("torch_spda", "torch_sdpa"), ("piky", "picky")])
def test_unknown_name_is_refused_with_the_list_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=r"there are: auto, torch_sdpa, naive, picky") as caught:
        choose(Phase.DECODE, name, [SHAPE])
    assert caught.value.hint == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "broken cannot serve decode: import no_such_package.attention:Backend: No module named"),
        ("wrong", "import third_party_attention:Wrong: third_party_attention:Wrong is not an AttentionBackend"),
        ("decode_only", "decode_only cannot serve decode: import no_such_module_of_ours: No module named"),
    ],
)
def test_backend_that_does_not_import_is_refused_with_the_cause(name: str, reason: str) -> None:
    with pytest.raises(BackendError, match=reason):
        choose(Phase.DECODE, name, [SHAPE])


def test_third_party_cannot_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, naive="third_party_attention:Picky")
    with pytest.raises(ConfigError, match="two attention backends are named naive"):
        choose(Phase.DECODE, "naive", [SHAPE])


def test_third_party_is_not_imported_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("auto searched the installed packages"))
    build_attention(config(), [SHAPE], None)


def test_rows_list_every_backend_in_every_phase() -> None:
    rows = {(row.name, row.phase): row for row in backend_rows(SHAPE)}
    assert len(rows) == 2 * 6
    assert rows["torch_sdpa", Phase.PREFILL].usable
    assert rows["torch_sdpa", Phase.PREFILL].reasons == []
    assert rows["picky", Phase.DECODE].usable
    assert not rows["picky", Phase.PREFILL].usable
    assert rows["decode_only", Phase.PREFILL].reasons == ["no prefill kernel"]
    assert "No module named" in rows["broken", Phase.DECODE].reasons[0]


def test_page_size_is_the_smallest_that_both_phases_take() -> None:
    assert choose_page_size(TorchSdpa, TorchSdpa, None, [SHAPE]) == 16
    assert choose_page_size(Naive, Picky, None, [SHAPE]) == 64
    assert choose_page_size(Naive, Picky, 256, [SHAPE]) == 256
    assert choose_page_size(Naive, TorchSdpa, 7, [SHAPE]) == 7


@pytest.mark.parametrize("wanted", [16, 128])
def test_page_size_that_a_phase_refuses_is_an_error(wanted: int) -> None:
    with pytest.raises(BackendError, match=rf"cannot share page size {wanted}: .*picky takes \(64, 256\) for decode"):
        choose_page_size(Naive, Picky, wanted, [SHAPE])


def test_phases_without_a_common_page_size_are_an_error() -> None:
    class Tiny(Naive):
        name: ClassVar[str] = "tiny"
        limits: ClassVar[dict[Phase, Limits]] = {
            Phase.PREFILL: replace(Naive.limits[Phase.PREFILL], page_sizes=range(1, 33))
        }

    with pytest.raises(BackendError, match=r"tiny takes range\(1, 33\) for prefill; picky takes \(64, 256\)"):
        choose_page_size(Tiny, Picky, None, [SHAPE])


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
    assert [bound[phase][0].name for phase in Phase] == [prefill, decode]


def test_both_phases_reasons_are_told_at_once() -> None:
    with pytest.raises(BackendError) as caught:
        build_attention(config(attention="picky"), [replace(SHAPE, dtype=torch.float16)], None)
    message, hint = str(caught.value).split("\n\n")
    assert message.splitlines() == [
        "picky cannot serve prefill: dtype torch.float16 not in (torch.bfloat16,)",
        "picky cannot serve decode: dtype torch.float16 not in (torch.float32,)",
    ]
    assert "--prefill-attention torch_sdpa" in hint
    assert "--decode-attention torch_sdpa" in hint


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


def test_import_error_tells_the_cause_and_is_silent_where_there_is_none() -> None:
    assert import_error("json") is None
    assert (
        import_error("no_such_module_at_all") == "import no_such_module_at_all: No module named 'no_such_module_at_all'"
    )


def test_import_error_survives_what_a_wheel_for_another_torch_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "wheel_for_another_torch.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(folder))
    assert import_error("wheel_for_another_torch") == "import wheel_for_another_torch: undefined symbol: _ZN3c10"


def test_limits_name_each_thing_that_does_not_fit() -> None:
    limits = Limits((torch.bfloat16,), range(8, 257, 8), range(256, 4097, 256), ("cuda",), (9, 0))
    shape = replace(SHAPE, head_dim=100, page_size=16)
    assert limits.problems(shape) == [
        "dtype torch.float32 not in (torch.bfloat16,)",
        "page_size 16 not in range(256, 4097, 256)",
        "device cpu not in ('cuda',)",
        "head_dim 100 not in range(8, 257, 8)",
        "needs compute capability (9, 0), has (0, 0)",
    ]
    fitting = Shape(8, 8, 64, 0.1, torch.bfloat16, "cuda", (9, 0), 256)
    assert limits.problems(fitting) == []
    assert limits.problems(replace(fitting, window=4)) == ["no sliding window, the model has one of 4"]
