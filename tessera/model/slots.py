"""The places of a model's weights while a checkpoint is read: each is filled once, none is left empty."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from tessera.errors import ModelError
from tessera.model.language_model import LanguageModel

HEAD_NAME = "lm_head.weight"
_CONVERT = "convert the model again, or check that config.json belongs to these weights"


class Slots:
    """Finds where a checkpoint tensor goes, and what is still missing."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.places = model.slots()
        self.filled: set[str] = set()

    def place(self, name: str, shape: Iterable[int], where: object) -> Tensor | None:
        """The memory that the tensor `name` of file `where` fills; None for one that holds no weights.

        Raises ModelError where the model has no such tensor, has it in another shape, or had it already.
        """
        full_name = name if name in self.places else self.model.prefix + name
        place = self.places.get(full_name)
        if place is None:
            if re.search(self.model.ignored, name):
                return None
            architecture = self.model.spec.architecture
            raise ModelError(f"{where} has the tensor {name!r:.120}, for which {architecture} has no place", _CONVERT)
        if tuple(shape) != tuple(place.shape):
            raise ModelError(
                f"the tensor {name!r:.120} in {where} has the shape {list(shape)}, the model needs {list(place.shape)}",
                _CONVERT,
            )
        if full_name in self.filled:
            raise ModelError(f"{where} has the tensor {name!r:.120} a second time", _CONVERT)
        self.filled.add(full_name)
        return place

    def check_filled(self, where: object) -> None:
        """Raise ModelError when the checkpoint at `where` left a weight without values."""
        missing = [name for name in self.places if name not in self.filled]
        if missing:
            first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ModelError(f"{where} lacks {len(missing)} of {len(self.places)} tensors: {first}", _CONVERT)
