"""Auto by measurement and the backends of other packages: timed like ours, and no harm where one is broken."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from plug_ins import SHAPE, config, register
from tessera.attention import cache, measure, registry
from tessera.attention import choose as choosing
from tessera.attention.backends.naive import Naive
from tessera.attention.choose import build_attention
from tessera.attention.contract import Claim, Limits, Phase, Shape
from tessera.attention.step import Bucket
from tessera.types import AttentionChoice

STEADY = {phase: replace(limits, batch_invariant=("cpu",)) for phase, limits in Naive.limits.items()}
SIZES = [Bucket(2, 1, 40), Bucket(1, 1, 20)]


class Ours(Naive):
    """Slow, so that whoever else may serve does."""

    name: ClassVar[str] = "ours"
    limits: ClassVar[dict[Phase, Limits]] = STEADY

    def run(self, *arguments: Any) -> torch.Tensor:
        time.sleep(0.01)
        return super().run(*arguments)


class Quick(Naive):
    name: ClassVar[str] = "quick"
    limits: ClassVar[dict[Phase, Limits]] = STEADY


class Wrong(Quick):
    name: ClassVar[str] = "wrong"

    def run(self, *arguments: Any) -> torch.Tensor:
        return super().run(*arguments) * 1.1


class FalseClaim(Quick):
    name: ClassVar[str] = "false_claim"

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        return Claim(("my_own_kernel",))


class RaisesWhenAsked(Quick):
    name: ClassVar[str] = "raises_when_asked"

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        raise ValueError("broken")


class RaisesForCosts(Quick):
    name: ClassVar[str] = "raises_for_costs"

    @classmethod
    def costly(cls, phase: Phase, shape: Shape) -> str | None:
        raise ValueError("broken")


class AcceptsWithoutLimits(Quick):
    name: ClassVar[str] = "accepts_without_limits"
    limits: ClassVar[dict[Phase, Limits]] = {}

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        return []


class RaisesWhenMade(Quick):
    name: ClassVar[str] = "raises_when_made"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        raise ValueError("broken")


class CompilesFirst(Quick):
    name: ClassVar[str] = "compiles_first"
    built: ClassVar[bool] = False

    @classmethod
    def costly(cls, phase: Phase, shape: Shape) -> str | None:
        return None if cls.built else "not built yet"


class HugeHeads(Quick):
    name: ClassVar[str] = "huge_heads"
    limits: ClassVar[dict[Phase, Limits]] = {
        phase: replace(limits, head_dims=range(1, 4097)) for phase, limits in STEADY.items()
    }


@pytest.fixture(autouse=True)
def _one_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (registry, choosing, cache):
        monkeypatch.setattr(module, "BACKENDS", {"ours": f"{__name__}:Ours"})
    monkeypatch.setattr(choosing, "AUTO", dict.fromkeys(Phase, ("ours",)))
    monkeypatch.setattr(measure, "BUCKETS", {("cpu", phase): SIZES for phase in Phase})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def build(mode: str = "cached", shape: Shape = SHAPE) -> dict[str, AttentionChoice]:
    _, _, choices = build_attention(config(attention_measure=mode), [shape, shape], None)
    return {choice.phase: choice for choice in choices}


def test_a_plug_in_that_is_the_fastest_serves_unnamed_and_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, quick=f"{__name__}:Quick")
    for reason in ("auto: measured", "auto: measured before"):
        choice = build()["decode"]
        assert (choice.backend, choice.reason) == ("quick", reason)
        assert set(choice.buckets[0].times_ms) == {"ours", "quick"}


def test_installed_packages_are_asked_once_as_long_as_the_path_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def search(*, group: str) -> EntryPoints:
        asked.append(group)
        return EntryPoints([EntryPoint("late", "late:Backend", group)])

    monkeypatch.setattr(registry, "entry_points", search)
    assert [registry.plug_ins(), registry.plug_ins()] == [["late"]] * 2 and len(asked) == 1
    monkeypatch.syspath_prepend("/a/folder/of/its/own")
    assert registry.plug_ins() == ["late"] and len(asked) == 2


def test_the_fixed_order_holds_ours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, quick=f"{__name__}:Quick")
    choice = build("off")["decode"]
    assert choice.backend == "ours" and choice.rejected == {}


BROKEN = {
    "gone": ("no_such_package:Backend", "import no_such_package:Backend fails"),
    "wrong": (f"{__name__}:Wrong", "fails its self-test: error"),
    "false_claim": (f"{__name__}:FalseClaim", "no kernel matches its claim 'my_own_kernel'"),
    "raises_when_asked": (f"{__name__}:RaisesWhenAsked", "reasons_against raises ValueError: broken"),
    "raises_for_costs": (f"{__name__}:RaisesForCosts", "costly raises ValueError: broken"),
    "accepts_without_limits": (f"{__name__}:AcceptsWithoutLimits", "no decode kernel"),
    "raises_when_made": (f"{__name__}:RaisesWhenMade", "ValueError: broken"),
    "alias": (f"{__name__}:Quick", "is registered as alias and calls itself quick"),
}


@pytest.mark.parametrize(("name", "path", "reason"), [(name, *of_name) for name, of_name in BROKEN.items()])
def test_a_broken_plug_in_is_a_reason_and_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, name: str, path: str, reason: str
) -> None:
    register(monkeypatch, **{name: path})
    choice = build()["decode"]
    assert choice.backend == "ours"
    assert reason in choice.rejected[name][0]


def test_two_plug_ins_of_one_name_are_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("quick", f"{__name__}:{path}", "tessera.attention") for path in ("Quick", "Wrong")]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: EntryPoints(points).select(group=group))
    choice = build()["decode"]
    assert choice.backend == "ours"
    assert choice.rejected["quick"][0].startswith("2 attention backends are named quick")


def test_a_model_that_only_a_plug_in_can_serve_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, huge_heads=f"{__name__}:HugeHeads")
    choice = build(shape=replace(SHAPE, head_dim=2048))["decode"]
    assert (choice.backend, choice.reason) == ("huge_heads", "auto: no other is timed here")


@dataclass(frozen=True)
class Package:
    name: str
    version: str


def key(*packages: Package | None) -> str:
    points = [EntryPoint("quick", f"{__name__}:Quick", "tessera.attention") for _ in packages]
    for point, package in zip(points, packages):
        vars(point).update(dist=package)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda *, group: EntryPoints(points).select(group=group))
        return str(cache.make_key(Phase.DECODE, {replace(SHAPE, page_size=16): 2}, SIZES))


def test_the_key_holds_the_plug_ins_package_and_version_and_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [key(), key(None), *(key(Package(name, version)) for name in "ab" for version in ("1.0", "1.1"))]
    assert "a 1.1" in keys[3] and key(Package("a", "1.1")) == keys[3]
    monkeypatch.setattr(cache, "_file_digest", lambda _: "edited")
    keys.append(key(Package("a", "1.0")))
    monkeypatch.setattr(Quick, "packages", ("torch", "pytest"))
    keys.append(key(Package("a", "1.0")))
    assert len(set(keys)) == len(keys)


def test_what_had_to_be_compiled_first_is_timed_once_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, compiles_first=f"{__name__}:CompilesFirst")
    for _ in range(2):
        choice = build()["decode"]
        assert choice.backend == "ours" and choice.rejected["compiles_first"] == ["not built yet"]
    monkeypatch.setattr(CompilesFirst, "built", True)
    assert build()["decode"].backend == "compiles_first"
