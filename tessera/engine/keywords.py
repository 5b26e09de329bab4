"""Settings as Python's keywords: errors written for the command line name them as a caller of `LLM` does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

from tessera.config import EngineConfig, Setting, section_types, settings_of
from tessera.errors import ConfigError, TesseraError

VLLM_NAMES = MappingProxyType(
    {
        "attention_backend": "attention",
        "block_size": "page_size",
        "enforce_eager": "cuda_graphs=False",
        "num_gpu_blocks_override": "num_pages",
    }
)
"""Settings of vLLM that have another name here -> what to write."""

_FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z]+(?:-[a-z]+)*)")


def config_of(settings: Mapping[str, Any]) -> EngineConfig:
    """The settings given as keywords; ConfigError for an unknown one, which names what vLLM's are called here."""
    for name in settings:
        if name in VLLM_NAMES:
            raise ConfigError(f"unknown setting {name!r}", f"it is {VLLM_NAMES[name]} here")
    return EngineConfig.from_flat(settings)


@contextmanager
def keywords_for_flags() -> Iterator[None]:
    """In every TesseraError raised within, name settings as keywords: `max_model_len` for --max-model-len."""
    try:
        yield
    except TesseraError as error:
        error.message = as_keywords(error.message)
        error.hint = None if error.hint is None else as_keywords(error.hint)
        error.args = (error.message,)
        raise


def as_keywords(text: str) -> str:
    """`text` with the flags of all engine settings as keywords; other flags stay."""
    return _FLAG.sub(_keyword, text)


def _keyword(flag: re.Match[str]) -> str:
    setting = _settings().get(flag[2].replace("-", "_"))
    if setting is None or (flag[1] and setting.kind is not bool):
        return flag[0]
    return f"{setting.name}=False" if flag[1] else setting.name


@cache
def _settings() -> dict[str, Setting]:
    return {
        setting.name: setting for section in section_types(EngineConfig).values() for setting in settings_of(section)
    }
