"""Device: which one, what it computes well in, and its name."""

from __future__ import annotations

import platform

import torch

from tessera.errors import ConfigError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """The device for `--device`; ConfigError where cuda is asked and torch sees none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was asked, torch sees no GPU", "use --device cpu, or a torch built for CUDA")
    use_cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if use_cuda else torch.device("cpu")


def choose_dtype(wanted: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype`; see ModelConfig.dtype for what auto means."""
    if wanted != "auto":
        return _DTYPES[wanted]
    if device.type == "cuda":
        if checkpoint == torch.float16 or torch.cuda.get_device_capability(device) < (8, 0):
            return torch.float16
        return torch.bfloat16
    return torch.bfloat16 if cpu_computes_bfloat16() else torch.float32


def cpu_computes_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot products; emulated, they are several times slower than float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) off CUDA."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def device_name(device: torch.device) -> str:
    """What the device calls itself, as in `cuda (NVIDIA H200)`."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for; 0 off CUDA, and where torch does not tell."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))
