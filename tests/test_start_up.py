"""What a start writes to stderr: each thing once, and no more than is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from test_cli import SMALL, TESSERA, run


def test_generate_says_in_a_dozen_lines_what_attends_and_why(tmp_path: Path) -> None:
    """At first use and later; the times and everybody who lost are for --log-level debug and `tessera backends`."""
    flags = ("--prompt", "a", "--max-tokens", "2", "--prove-attention", *SMALL)
    first, later = (run("generate", *flags, XDG_CACHE_HOME=str(tmp_path)).stderr for _ in range(2))
    for said in (first, later):
        assert len(said.splitlines()) <= 12, said
        for phase in ("prefill", "decode"):
            assert said.count(f"{phase} attention: torch_sdpa (auto: ") == 1
            assert said.count(f"{phase} attention proven: torch_sdpa ran ") == 1
    assert "not naive: " not in first and "measuring" not in later
    assert "not naive: " in run("generate", *flags, "--log-level", "debug", "--attention-measure", "force").stderr
    assert run("generate", *flags, "--log-level", "warning").stderr == ""


def test_serve_shows_each_reason_once_and_a_folder_that_cannot_be_written_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = []
    command = [*TESSERA, "serve", "--port", "0", *SMALL]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "URL " in line:
                process.terminate()
                break
        process.communicate(timeout=30)
    said = "".join(lines)
    assert said.count("not naive: ") == 2 and said.count("8 x 128: torch_sdpa") == 1, said  # 2: a reason for each phase
    assert said.count("is not kept") == 1 and "cannot be read" not in said


ENGINE = """
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
settings = {"model": "dummy:135m", "device": "cpu", "max_model_len": 256, "num_pages": 20, "load_format": "dummy"}
build_engine(EngineConfig.from_flat(settings | {"attention": "torch_sdpa"}))
"""


def test_an_engine_starts_without_the_packages_that_take_seconds_to_import(tmp_path: Path) -> None:
    """transformers never; torch's compiler and what it needs only where `import torch` itself brings them in."""
    ours = _imported_by(ENGINE, tmp_path)
    assert "torch" in ours and "transformers" not in ours
    slow = {"sympy", "scipy", "sklearn", "pandas", "torch._dynamo", "torch._inductor"}
    assert not (ours & slow) - _imported_by("import torch", tmp_path)


def _imported_by(code: str, cache: Path) -> set[str]:
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return set(json.loads(done.stdout.splitlines()[-1]))
