"""Weights from safetensors files, shard by shard, each tensor copied once from the mapped file to its place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tessera.errors import ModelError
from tessera.model.hf_config import read_json
from tessera.model.language_model import LanguageModel
from tessera.model.slots import HEAD_NAME, Slots
from tessera.model.threads import for_each

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ROWS_COMPARED = 8192


def load_safetensors(model: LanguageModel, folder: Path, *, progress: bool) -> None:
    """Fill the model from the safetensors files in `folder`, converting types on the way.

    Raises ModelError for a file that is missing or damaged and for tensors that are missing, unknown, of the
    wrong shape or quantised.
    """
    slots = Slots(model)
    tied_head: Tensor | None = None
    with tqdm(total=len(slots.places), desc="Loading weights", unit="tensor", disable=not progress) as bar:
        for path in find_shards(folder):
            jobs: list[tuple[Tensor, Tensor]] = []
            for name, tensor in _read_shard(path):
                _check_type(name, tensor, path)
                if name == HEAD_NAME and model.spec.tie_word_embeddings:
                    tied_head = tensor
                    continue
                place = slots.place(name, tensor.shape, path)
                if place is not None:
                    jobs.append((place, tensor))
            for _ in for_each(_copy, jobs):
                bar.update()
    slots.check_filled(folder)
    if tied_head is not None:
        _check_tied(tied_head, model, folder)


def _copy(job: tuple[Tensor, Tensor]) -> None:
    place, tensor = job
    place.copy_(tensor)


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of the model in `folder`: those of its index, or its only one."""
    index = folder / _INDEX
    if index.exists():
        return _indexed_shards(index)
    for paths in ([folder / "model.safetensors"], sorted(folder.glob("*.safetensors"))):
        if len(paths) == 1 and paths[0].exists():
            return paths
    if paths:
        names = ", ".join(path.name for path in paths[:3])
        raise ModelError(f"{folder} has {len(paths)} safetensors files ({names}) and no {_INDEX}", f"add {_INDEX}")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} has its weights in {pickles[0]}, a format that can run code, which is never read",
            "convert the model to safetensors",
        )
    raise ModelError(f"{folder} has no safetensors file", "add the weights, or try --load-format dummy")


def _indexed_shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map", "download the file again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r:.120}, not a safetensors file beside it", "mend the index")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
            "download the model again",
        )
    return [index.parent / name for name in names]


def _read_shard(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file, still in the file: its memory is the mapping."""
    try:
        with safe_open(str(path), framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118  a shard is no mapping
                yield name, shard.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} is not a sound safetensors file: {reason}"[:400], "download the file again") from None


def _check_type(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.dtype not in _FLOATS and not name.endswith(".attn.bias"):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"the tensor {name!r:.120} in {path} is {kind}, and quantised weights are not supported here",
            "use the model in bfloat16, float16 or float32",
        )


def _check_tied(head: Tensor, model: LanguageModel, folder: Path) -> None:
    """A tied model may carry its head again, but only the same one."""
    embedding = model.head.weight
    same = head.shape == embedding.shape
    for start in range(0, embedding.shape[0] if same else 0, _ROWS_COMPARED):
        rows = slice(start, start + _ROWS_COMPARED)
        same = same and torch.equal(head[rows].to(embedding), embedding[rows])
    if not same:
        raise ModelError(
            f"{folder} has a {HEAD_NAME} that differs from the embedding, although tie_word_embeddings is true",
            "set tie_word_embeddings to false in config.json",
        )
