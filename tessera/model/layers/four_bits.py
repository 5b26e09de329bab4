"""Weights of four bits, multiplied as they are: on a CPU, in steps of few tokens.

Such a step does little but read weights, and these are less than a third of what they are in bfloat16. ggml's Q4_0,
Q4_1 and Q4_K are all numbers of 0 to 15 with a scale and an offset for each 32, which is what torch's kernel takes.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

GROUP = 32
"""Weights of a row that share a scale and an offset."""
MOST_TOKENS = 8
"""Up to which these products are faster than those of packed bfloat16 weights. The 120 of a step of SmolLM2, alone, on
two cores with AVX-512 and AMX, torch 2.13: 3.7 and 16.5 ms for 1 token, 12.8 and 17.4 for 8, 23.4 and 18.4 for 16."""
BLOCK = 64
"""Rows that may be packed without others: the kernel keeps them in blocks of 64, 32 or 16."""


class FourBits:
    """One weight: weight = (number - 8) * scale + offset, the last two rounded to bfloat16.

    That rounds about as much away as bfloat16 weights do. Empty until every row was filled.
    """

    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        """A weight of [num_outputs, num_inputs]; `fits` says of which shapes."""
        self._packed = torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8)
        self._groups = torch.empty(num_inputs // GROUP, num_outputs, 2, dtype=torch.bfloat16)

    def fill(self, first_row: int, numbers: Tensor, scales: Tensor, offsets: Tensor) -> None:
        """Some rows, packed; five bytes a weight are needed meanwhile.

        first_row        a multiple of BLOCK, as the number of rows, unless these are the last
        numbers          [rows, inputs] uint8, 0 to 15
        scales, offsets  [rows, inputs / GROUP] float32
        """
        rows = slice(first_row, first_row + len(numbers))
        # The 1 is for other devices' layouts.
        self._packed[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
        self._groups[:, rows, 0], self._groups[:, rows, 1] = scales.t(), offsets.t()

    def multiply(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the weight, added up in float32 and rounded; bias is added to that and rounded again.

        A row of up to MOST_TOKENS has the same bits whatever the others hold and however many there are.

        hidden, bias  [tokens, inputs], [outputs], bfloat16
        returns       [tokens, outputs] bfloat16
        """
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            hidden.contiguous(), self._packed, GROUP, self._groups
        )
        return product if bias is None else product.add_(bias)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self._packed.nbytes + self._groups.nbytes


def fits(num_outputs: int, num_inputs: int) -> bool:
    """Whether the kernel takes a weight of this shape."""
    return num_outputs % 16 == 0 and num_inputs % GROUP == 0


def processor_refused() -> str | None:
    """Why the kernel would be slow, or is not there; None where neither is so."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512") or sys.platform == "win32":
        return (
            f"torch's kernel for them is slow but with AVX2 or AVX512 outside Windows, and here it is {capability} "
            f"on {sys.platform}"
        )
    names = ("_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")
    missing = [name for name in names if not hasattr(torch.ops.aten, name)]
    return f"this torch has no {missing[0]}" if missing else None
