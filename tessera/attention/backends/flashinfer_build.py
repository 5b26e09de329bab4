"""Whether flashinfer's kernels for a shape are built, and what builds them.

The library compiles one module a type, head size and feature, and keeps it on disk.
"""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from pathlib import Path

import torch

from tessera.attention.contract import Shape


def build_needed(kernels: str, shape: Shape) -> str | None:
    """Which module nvcc would have to compile first, in a sentence; None where it is there.

    kernels  fa2, fa3 or decode
    """
    try:
        modules, env = import_module("flashinfer.jit.attention.modules"), import_module("flashinfer.jit.env")
        types = (shape.dtype, shape.dtype, shape.dtype, torch.int32)
        sizes = (shape.head_dim, shape.head_dim, 0, shape.window is not None, shape.soft_cap is not None)
        if kernels == "decode":
            name = modules.get_batch_decode_uri(*types, *sizes)
        else:
            name = modules.get_batch_prefill_uri(kernels, *types, *sizes, False)
        folders = (env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR)
    except Exception:  # another release may name these otherwise: then nothing is known against using it
        return None
    if any((Path(folder) / name / f"{name}.so").exists() for folder in folders):
        return None
    return "its kernels for this shape are not built yet, which takes nvcc up to minutes: name it once to build them"


def has_nvcc() -> bool:
    """Whether the library will find a compiler where it looks: CUDA_HOME, the path, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home is not None:
        return (Path(home) / "bin" / "nvcc").exists()
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()
