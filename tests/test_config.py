"""Settings: documented, checked, and refused when they mean nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.config import RANGES, EngineConfig, ServerConfig, check_section, section_types, settings_of
from tessera.environment import check_environment
from tessera.errors import ConfigError

SECTIONS = [*section_types(EngineConfig).values(), ServerConfig]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_docstring_and_a_default_that_fits(section: type) -> None:
    check_section(section())
    for setting in settings_of(section):
        assert len(setting.help) > 20
        assert setting.kind in (bool, int, float, str)
        assert setting.name in RANGES or setting.kind not in (int, float)


def test_no_two_sections_have_a_field_of_the_same_name() -> None:
    names = [setting.name for section in SECTIONS for setting in settings_of(section)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization must be a number from 0.01 to 1, got 1.5"),
        ({"max_num_seqs": 0}, "max_num_seqs must be a whole number from 1 to 65536, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs must be a whole number"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching must be a bool, got 'yes'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size 2 is not supported yet, only 1 is"),
        ({"max_model_length": 5}, "unknown setting 'max_model_length'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_value(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_flat(settings)
    assert said in caught.value.message
    assert caught.value.hint


def test_an_unknown_environment_name_is_refused_with_the_nearest_known() -> None:
    check_environment({"TESSERA_API_KEY": "k", "HOME": "/"})
    with pytest.raises(ConfigError, match="TESSERA_APIKEY has no effect") as caught:
        check_environment({"TESSERA_APIKEY": "k"})
    assert caught.value.hint == "did you mean TESSERA_API_KEY?"


def test_resolving_leaves_nothing_open_and_the_original_as_it_was() -> None:
    config = EngineConfig()
    resolved = config.resolve(
        device="cpu", dtype="float32", max_model_len=100, page_size=16, max_num_batched_tokens=1024
    )
    assert config == EngineConfig()
    assert (resolved.device.device, resolved.model.dtype, resolved.model.max_model_len) == ("cpu", "float32", 100)
    assert (resolved.cache.page_size, resolved.scheduler.max_num_batched_tokens) == (16, 1024)
