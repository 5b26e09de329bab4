"""What torch itself says against a kernel of its attention: a variant is tried on a tiny batch, alone.

Asked for a kernel that cannot serve a call, torch takes another one; only where the others are forbidden
does it raise, with the reasons as warnings.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.workloads import Workload, make_case

LENS = {
    Phase.PREFILL: ((3, 3), (2, 5)),
    Phase.DECODE: ((1, 3), (1, 70)),
    Phase.VISION: ((3, 3),),
}
"""Every kind of call that a phase makes: as many queries as keys, and fewer."""
HEADINGS = {
    SDPBackend.FLASH_ATTENTION: "Flash attention kernel not used because",
    SDPBackend.EFFICIENT_ATTENTION: "Memory efficient kernel not used because",
    SDPBackend.CUDNN_ATTENTION: "cuDNN attention kernel not used because",
}
"""What torch writes before its reasons against each kernel."""


def refusals(backend: type[AttentionBackend[Any]], kernel: SDPBackend, phase: Phase, shape: Shape) -> list[str]:
    """Torch's reasons why `backend`, which allows `kernel` alone, cannot serve; empty if it can.

    Launches it once a shape, so the device must be at hand: where it is not, nothing can be said against it.
    """
    if shape.device_type == "cuda" and not torch.cuda.is_available():
        return []
    # The size of pages changes nothing for torch; that of a window only matters in that it needs a mask.
    window = None if shape.window is None else 2
    return list(_tried(backend, kernel, phase, replace(shape, page_size=16, window=window)))


@cache
def _tried(backend: type[AttentionBackend[Any]], kernel: SDPBackend, phase: Phase, shape: Shape) -> tuple[str, ...]:
    workload = Workload(LENS[phase], shape.window, causal=shape.causal)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            make_case(phase, workload, shape).answer(backend)
        except RuntimeError as error:
            reasons = reasons_in((str(warning.message) for warning in caught), kernel)
            return reasons or (f"torch raises: {_sentence(str(error))}",)
    return ()


def reasons_in(messages: Iterable[str], kernel: SDPBackend) -> tuple[str, ...]:
    """The sentences in torch's warnings that speak of `kernel`, each once.

    Warnings are a process's, and another thread may be compiling meanwhile: torch's own say where they come from.
    """
    found: dict[str, None] = {}
    ours = False
    for message in messages:
        if "Triggered internally" not in message:
            continue
        if "not used because" in message:
            ours = message.lower().startswith(HEADINGS.get(kernel, "").lower())
        elif ours:
            found[f"torch: {_sentence(message)}"] = None
    return tuple(found)


def _sentence(message: str) -> str:
    """Without where in torch it was written, in one line."""
    return " ".join(re.sub(r"\(Triggered internally at .*", "", message).split()).rstrip(" .,")
