"""Backends of another package, some of them broken, and how it registers them."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, EntryPoints
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from attention_cases import make_shape
from tessera.attention import registry
from tessera.attention.backends.naive import Naive
from tessera.attention.contract import Limits, Phase
from tessera.config import AttentionConfig, EngineConfig

SHAPE = make_shape(page_size=None)


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


def register_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package beside tessera that registers backends, two of which serve."""
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
    """Let these be all that is registered."""
    points = EntryPoints(EntryPoint(name, path, "tessera.attention") for name, path in paths.items())
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points.select(group=group))


def config(**settings: object) -> AttentionConfig:
    """Settings of attention; not measured unless they say so."""
    return EngineConfig.from_flat({"attention_measure": "off"} | settings).attention
