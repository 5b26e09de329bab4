from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from attention_cases import make_shape
from tessera.attention import choose as choosing
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.backends.torch_sdpa import TorchSdpa
from tessera.attention.choose import AUTO, build_attention, choose
from tessera.attention.contract import Limits, Phase, Shape, import_error
from tessera.attention.registry import BACKENDS, backend_paths, backend_rows, leftover_warnings, load_backend
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
    """Wants a wheel that is not there."""

    name: ClassVar[str] = "decode_only"
    needs: ClassVar[tuple[str, ...]] = ("no_such_module_of_ours",)
    install: ClassVar[str | None] = "pip install no-such-wheel"
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
        alias="third_party_attention:Picky",
        broken="no_such_package.attention:Backend",
    )


def register(monkeypatch: pytest.MonkeyPatch, **paths: str) -> None:
    points = EntryPoints(EntryPoint(name, path, "tessera.attention") for name, path in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


@pytest.fixture(autouse=True)
def order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed order without those that are installed on some machines only."""
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("triton", "torch_sdpa", "naive")))


def config(**names: str) -> AttentionConfig:
    return AttentionConfig(**({"attention_measure": "off"} | names))  # type: ignore[arg-type]


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


@pytest.mark.parametrize(("name", "near"), [("torch_spda", "torch_sdpa"), ("piky", "picky"), ("auot", "auto")])
def test_unknown_name_is_refused_with_the_list_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=r"there are: auto, flash_attn:4, .*naive, picky") as caught:
        choose(Phase.DECODE, name, [SHAPE])
    assert caught.value.hint == f"did you mean {near}?"


@pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])
def test_a_library_that_has_only_variants_is_refused_with_their_list(name: str) -> None:
    variants = [other for other in BACKENDS if other.startswith(f"{name}:")]
    with pytest.raises(ConfigError) as caught:
        load_backend(name)
    assert caught.value.message == f"{name} is a library with variants: {', '.join(variants)}"
    assert caught.value.hint == f"name one, as {variants[0]}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "import no_such_package.attention:Backend fails: ModuleNotFoundError: No module named"),
        ("wrong", "third_party_attention:Wrong is not an AttentionBackend"),
        ("alias", "third_party_attention:Picky is registered as alias and calls itself picky"),
    ],
)
def test_a_broken_plug_in_is_listed_with_its_reason_and_refused_when_named(name: str, reason: str) -> None:
    rows = {(row.name, row.phase): row for row in backend_rows([SHAPE])}
    for phase in Phase:
        assert not rows[name, phase].usable and rows[name, phase].reasons[0].startswith(reason)
    with pytest.raises(BackendError, match=reason):
        choose(Phase.DECODE, name, [SHAPE])
    with pytest.raises(BackendError, match=reason):
        load_backend(name)
    build_attention(config(), [SHAPE], None)  # nobody else is bothered


def test_missing_wheel_is_refused_with_what_installs_it() -> None:
    with pytest.raises(BackendError, match="decode_only cannot serve decode: no_such_module_of_ours is not") as caught:
        choose(Phase.DECODE, "decode_only", [SHAPE])
    assert caught.value.hint == "pip install no-such-wheel, or use --decode-attention torch_sdpa"


def test_what_would_not_help_is_not_offered_for_installation() -> None:
    with pytest.raises(BackendError) as caught:
        choose(Phase.DECODE, "decode_only", [replace(SHAPE, dtype=torch.float16)])
    assert caught.value.hint == "use --decode-attention torch_sdpa"


def test_a_name_that_two_packages_bring_is_a_reason_and_an_error_for_who_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, naive="third_party_attention:Picky")
    said = "2 attention backends are named naive: tessera.attention.backends.naive:Naive and third_party_attention:Pick"
    with pytest.raises(ConfigError, match=said) as caught:
        choose(Phase.DECODE, "naive", [SHAPE])
    assert caught.value.hint == "uninstall the package that brings third_party_attention:Picky"
    row = next(row for row in backend_rows([SHAPE]) if row.name == "naive")
    assert row.reasons[0].startswith(said)
    build_attention(config(), [SHAPE], None)


def test_load_backend_gives_the_class_of_a_name() -> None:
    assert load_backend("naive") is Naive
    assert load_backend("picky") is Picky


def test_every_name_of_ours_is_a_backend_that_knows_its_name_and_its_claim() -> None:
    for name in BACKENDS:
        backend = load_backend(name)
        assert backend.name == name
        for phase in backend.limits:
            shape = registry.shape_in(phase, replace(SHAPE, device_type="cuda", page_size=16))
            assert backend.claim(phase, shape).must


def test_vision_is_refused_for_a_model_that_takes_no_images() -> None:
    with pytest.raises(ConfigError, match="--vision-attention naive was asked, the model has no vision tower"):
        build_attention(config(vision_attention="naive"), [SHAPE], None)
    build_attention(config(vision_attention="auto"), [SHAPE], None)


def test_leftover_variables_of_other_engines_get_a_warning_that_says_which_flag_to_use() -> None:
    said = leftover_warnings(
        {
            "VLLM_ATTENTION_BACKEND": "XFORMERS",
            "VLLM_FLASH_ATTN_VERSION": "3",
            "SGLANG_ATTENTION_BACKEND": "fa3",
            "VLLM_LOGGING_LEVEL": "INFO",
            "HOME": "/",
        }
    )
    assert len(said) == 3
    assert said[0].startswith("environment variable VLLM_ATTENTION_BACKEND=XFORMERS has no effect")
    assert all("--attention" in warning for warning in said)


def test_third_party_is_not_imported_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("auto searched the installed packages"))
    build_attention(config(), [SHAPE], None)


def test_rows_list_every_backend_in_every_phase() -> None:
    rows = {(row.name, row.phase): row for row in backend_rows([SHAPE, replace(SHAPE, window=8)])}
    assert len(rows) == 3 * len(backend_paths())
    for phase in Phase:
        assert rows["naive", phase].usable and rows["naive", phase].reasons == []
    assert rows["picky", Phase.DECODE].reasons == ["no sliding window, the model has one of 8"]
    assert rows["decode_only", Phase.PREFILL].reasons == ["no prefill kernel"]
    assert rows["decode_only", Phase.VISION].reasons == ["no vision kernel"]
    assert not rows["flash_attn:4", Phase.VISION].usable


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
    assert import_error("no_such_module_at_all") == "no_such_module_at_all is not installed"


def test_import_error_survives_what_a_wheel_for_another_torch_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "wheel_for_another_torch.py").write_text("raise OSError('undefined symbol:\\n_ZN3c10')")
    monkeypatch.syspath_prepend(str(folder))
    said = "import wheel_for_another_torch fails: undefined symbol: _ZN3c10"
    assert import_error("wheel_for_another_torch") == said
    monkeypatch.setattr(Picky, "needs", ("wheel_for_another_torch",))
    with pytest.raises(BackendError, match=said):
        choose(Phase.DECODE, "picky", [SHAPE])


def test_limits_name_each_thing_that_does_not_fit() -> None:
    limits = Limits(
        (torch.bfloat16,), range(8, 257, 8), page_sizes=range(256, 4097, 256), devices=("cuda",), min_capability=(9, 0)
    )
    shape = replace(SHAPE, head_dim=100, page_size=16)
    assert limits.problems(shape) == [
        "dtype torch.float32 not in (torch.bfloat16,)",
        "page_size 16 not in range(256, 4097, 256)",
        "device cpu not in ('cuda',)",
        "head_dim 100 not in range(8, 257, 8)",
    ]
    fitting = Shape(8, 8, 64, 0.1, torch.bfloat16, "cuda", (9, 0), 256)
    assert limits.problems(fitting) == []
    assert limits.problems(replace(fitting, window=4)) == ["no sliding window, the model has one of 4"]
