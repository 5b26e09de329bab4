"""The example of a package that brings a backend: installed as users install it, found, verified; and broken copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "examples" / "third_party_backend"
NAME = "chunked_softmax"
BROKEN = {
    "drops the window": (
        "hidden |= distance.abs() >= self.shape.window",
        "pass",
        "workload/window_shorter_than_context",
        "claims a sliding window of 16",
    ),
    "takes a scale of its own": (
        "q.float() * self.shape.scale",
        "q.float() * q.shape[-1] ** -0.5",
        "use/scale",
        "claims a scale other than 1/sqrt(head_dim)",
    ),
    "leaves padding rows undefined": (
        "q.new_zeros(q.shape)",
        'q.new_full(q.shape, float("nan"))',
        "workload/padding_rows",
        "2 of 4 rows are not finite",
    ),
}


def install(source: Path, target: Path) -> Path:
    """Install the package offline, with the build tool that is here, into a folder of its own."""
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(source)],
        check=True,
        timeout=120,
        # What pip builds stays out of the repository: `source` is a copy.
        cwd=source,
    )
    return target


def copy(folder: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    return install(copy(folder / "source"), folder / "site")


def edit(site: Path, old: str, new: str) -> None:
    module = site / NAME / "backend.py"
    code = module.read_text()
    assert code.count(old) == 1
    module.write_text(code.replace(old, new))


def tessera(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tessera.cli", *args, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_installed_package_is_listed_beside_our_own_backends(installed: Path) -> None:
    rows = lines_of(tessera(installed, "backends", "--json", "--dtype", "float32"))
    listed = {row["phase"]: row["usable"] for row in rows if row["backend"] == NAME}
    assert listed == {"prefill": True, "decode": True, "vision": True}
    assert "naive" in {row["backend"] for row in rows}


def test_the_installed_package_keeps_every_claim_and_serves_a_model(installed: Path) -> None:
    done = tessera(installed, "verify", NAME, "--dtype", "float32", "--json")
    lines = lines_of(done)
    assert done.returncode == 0, [line for line in lines if line.get("outcome") == "fail"]
    summary = lines[-1]["summary"]
    assert summary["backend"] == NAME and summary["versions"]["tessera-example-attention"] == "0.1.0"
    passed = {(line["phase"], line["check"]) for line in lines[:-1] if line["outcome"] == "pass"}
    for phase in ("prefill", "decode", "vision"):
        assert (phase, "proof/kernels") in passed and (phase, "head_dim/80") in passed
    assert ("prefill+decode", "engine/greedy_tokens_with_window") in passed
    sinks = next(line for line in lines if line.get("check") == "workload/sinks")
    assert (sinks["outcome"], sinks["detail"]) == ("not claimed", "no attention sinks, the model has them")


@pytest.mark.parametrize(("mode", "steady"), [("cached", True), ("cached", False), ("off", True)])
def test_auto_times_the_package_unnamed_and_its_fixed_order_does_not(
    installed: Path, tmp_path: Path, mode: str, steady: bool
) -> None:
    site = Path(shutil.copytree(installed, tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__")))
    if steady:  # one sequence after another, so that it may claim this
        edit(site, 'devices=("cpu", "cuda"),', 'devices=("cpu", "cuda"), batch_invariant=("cpu",),')
    flags = ["--prompt", "a", "--max-tokens", "2", "--dtype", "float32", "--log-level", "debug", "--prove-attention"]
    done = tessera(site, "generate", *flags, "--attention-measure", mode)
    assert done.returncode == 0, done.stderr
    assert (f"measuring decode attention: torch_sdpa, {NAME}\n" in done.stderr) == (steady and mode == "cached")
    assert (f"not {NAME}: does not promise the same bits" in done.stderr) == (not steady)


@pytest.mark.parametrize(("right", "wrong", "label", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_copy_fails_and_the_claim_is_named(
    installed: Path, tmp_path: Path, right: str, wrong: str, label: str, words: str
) -> None:
    site = Path(shutil.copytree(installed, tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__")))
    edit(site, right, wrong)
    done = tessera(site, "verify", NAME, "--phase", "decode", "--dtype", "float32", "--json")
    failed = {line["check"]: line["detail"] for line in lines_of(done)[:-1] if line["outcome"] == "fail"}
    assert done.returncode == 1
    assert label in failed
    assert failed[label].startswith(f"{NAME} claims ") and words in failed[label]


def test_the_guide_shows_the_backend_as_it_is() -> None:
    guide = (ROOT / "docs" / "WRITE_A_BACKEND.md").read_text()
    assert (PACKAGE / NAME / "backend.py").read_text().strip() in guide
    assert '[project.entry-points."tessera.attention"]\n' in guide


def test_the_example_is_benchmarked_beside_ours(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "kernels.jsonl"
    small = ("--workloads", "q32,2q1s48", "--dtypes", "float32", "--repeats", "2", "--json", "--out", str(out))
    done = tessera(installed, "bench", "kernels", "--backends", f"{NAME},naive", *small)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [row for row in rows if row["kind"] == "kernels" and row["subject"]["label"] == NAME]
    assert [row["status"] for row in ours] == ["ok", "ok"] and all(row["metrics"]["ms_median"] > 0 for row in ours)
    assert all(proof["backend"] == NAME and proof["symbols"] for row in ours for proof in row["subject"]["proofs"])
