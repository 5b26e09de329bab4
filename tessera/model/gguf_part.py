"""A tensor of a GGUF file and the place in a model that it fills."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tessera.model.gguf_file import GGUFTensor


class GGUFPart(NamedTuple):
    """One tensor on its way."""

    place: Tensor
    """A parameter or a view of one: [rows, columns], or [columns]."""
    tensor: GGUFTensor
    unweave: int | None
    """Size of the heads whose rows have to be put in order; None where they are."""

    def raw_rows(self, start: int, end: int) -> Tensor:
        """Bytes of rows start .. end of the place, as the file has them: [(end - start) * bytes of a row] uint8."""
        num_rows = self.place.shape[0]
        rows = self.tensor.data.view(num_rows, -1)
        if self.unweave is None:
            return rows[start:end].flatten()
        return rows[self.in_order(torch.arange(num_rows)[:, None])[start:end, 0]].flatten()

    def in_order(self, rows: Tensor) -> Tensor:
        """[whole heads * head_dim, n], as the file has them -> as the model has them."""
        if self.unweave is None:
            return rows
        # Within each head, row 2i back to row i and row 2i + 1 to row i + head_dim / 2.
        return rows.view(-1, self.unweave // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
