"""The names of backends, ours and those of other packages: which there are, and what a wrong one may have meant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plug_ins import SHAPE, Picky, config, register, register_third_party
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.choose import build_attention, choose
from tessera.attention.contract import Limits, Phase, Shape, import_error
from tessera.attention.registry import BACKENDS, backend_paths, backend_rows, leftover_warnings, load_backend
from tessera.errors import BackendError, ConfigError


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    register_third_party(monkeypatch)


@pytest.mark.parametrize(("name", "near"), [("torch_spda", "torch_sdpa"), ("piky", "picky"), ("auot", "auto")])
def test_unknown_name_is_refused_with_the_list_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=r"there are: auto, flash_attn:4, .*naive, picky") as caught:
        choose(Phase.DECODE, name, [SHAPE])
    assert caught.value.hint == f"did you mean {near}?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Triton", "triton"),
        ("TORCH_SDPA", "torch_sdpa"),
        ("FLASH_ATTN", "flash_attn:4, flash_attn:3 or flash_attn:2"),
        ("fa", "flash_attn:4, flash_attn:3 or flash_attn:2"),
        ("fa3", "flash_attn:3"),
        ("flash_attention_2", "flash_attn:2"),
        ("FLASHINFER", "flashinfer:fa2, flashinfer:fa3, flashinfer:tensor_cores or flashinfer:cuda_cores"),
        ("fi", "flashinfer:fa2, flashinfer:fa3, flashinfer:tensor_cores or flashinfer:cuda_cores"),
        ("FlashInfer:FA3", "flashinfer:fa3"),
        ("XFORMERS", "xformers"),
        ("FLEX_ATTENTION", "flex"),
        ("TRITON_ATTN", "triton"),
        ("TRITON_ATTN_VLLM_V1", "triton"),
        ("sdpa", "torch_sdpa"),
        ("torch_native", "torch_sdpa"),
        ("eager", "naive"),
        ("AUTO", "auto"),
    ],
)
def test_a_name_of_another_engine_or_in_capitals_is_refused_with_ours(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown attention backend '{name}'") as caught:
        choose(Phase.DECODE, name, [SHAPE])
    assert caught.value.hint == f"did you mean {meant}?"


def test_auto_is_neither_a_backend_nor_offered_where_one_must_be_named() -> None:
    with pytest.raises(ConfigError, match="auto is no attention backend but the choice between them") as caught:
        load_backend("auto")
    assert "auto" not in caught.value.message.partition("there are: ")[2]
    with pytest.raises(ConfigError, match="there are: flash_attn:4") as caught:
        load_backend("auot")
    assert caught.value.hint == "see `tessera backends`"


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


def test_rows_list_every_backend_in_every_phase() -> None:
    rows = {(row.name, row.phase): row for row in backend_rows([SHAPE, replace(SHAPE, window=8)])}
    assert len(rows) == 3 * len(backend_paths())
    for phase in Phase:
        assert rows["naive", phase].usable and rows["naive", phase].reasons == []
    assert rows["picky", Phase.DECODE].reasons == ["no sliding window, the model has one of 8"]
    assert rows["decode_only", Phase.PREFILL].reasons == ["no prefill kernel"]
    assert rows["decode_only", Phase.VISION].reasons == ["no vision kernel"]
    assert not rows["flash_attn:4", Phase.VISION].usable


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
