"""xformers without xformers: what is gathered and which mask is asked for, on a stand-in with dense arithmetic."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_cases import check, make_shape
from tessera.attention.backends.xformers import XFormers
from tessera.attention.contract import Phase, import_error, is_installed
from tessera.attention.workloads import WORKLOADS, make_case


@dataclass(frozen=True)
class Mask:
    """Stands for BlockDiagonalMask and what can be made of it."""

    q_lens: list[int]
    kv_lens: list[int]
    causal: bool = False
    window: int | None = None

    @classmethod
    def from_seqlens(cls, q_lens: list[int], kv_lens: list[int], *, device: Any) -> Mask:
        return cls(q_lens, kv_lens)

    def make_causal_from_bottomright(self) -> Mask:
        return replace(self, causal=True)

    def make_local_attention_from_bottomright(self, window: int) -> Mask:
        return replace(self, causal=True, window=window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, op: object) -> Tensor:
    """Block by block, counted from the bottom right, as xformers documents its masks."""
    assert op is Operator
    assert q.shape[2] == k.shape[2]
    outputs = []
    blocks = zip(torch.split(q[0], mask.q_lens), *(torch.split(x[0], mask.kv_lens) for x in (k, v)))
    for queries, keys, values in blocks:
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        distance = torch.arange(len(keys) - len(queries), len(keys))[:, None] - torch.arange(len(keys))
        if mask.causal:
            scores = scores.masked_fill(distance < 0, -torch.inf)
        if mask.window is not None:
            scores = scores.masked_fill(distance >= mask.window, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)[None]


class Operator:
    """Stands for cutlass.FwOp."""

    OPERATOR = object()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    contents: dict[str, dict[str, object]] = {
        "xformers": {},
        "xformers.ops": {},
        "xformers.ops.fmha": {"memory_efficient_attention_forward": attend},
        "xformers.ops.fmha.cutlass": {"FwOp": Operator},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": Mask},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        for attribute, value in attributes.items():
            setattr(module, attribute, value)
        monkeypatch.setitem(sys.modules, name, module)
    limits = {phase: replace(one, devices=("cpu",)) for phase, one in XFormers.limits.items()}
    monkeypatch.setattr(XFormers, "limits", limits)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    is_installed.cache_clear()
    import_error.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Any:
    yield
    is_installed.cache_clear()
    import_error.cache_clear()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in Phase for name in WORKLOADS[phase]])
def test_workload_equals_the_oracle_or_is_refused(phase: Phase, name: str) -> None:
    case = make_case(phase, WORKLOADS[phase][name], make_shape())
    reasons = XFormers.reasons_against(phase, case.shape)
    assert bool(reasons) == ("soft_cap" in name or "sinks" in name)
    if not reasons:
        check(case, XFormers)


@pytest.mark.usefixtures("stand_in")
def test_window_to_both_sides_is_refused() -> None:
    shape = make_shape(window=8, causal=False)
    assert XFormers.reasons_against(Phase.PREFILL, shape) == [
        "no window to both sides, xformers' local masks are causal"
    ]


@pytest.mark.skipif(is_installed("xformers"), reason="xformers is installed")
def test_absence_is_told() -> None:
    assert "xformers is not installed" in XFormers.reasons_against(Phase.DECODE, make_shape())
