"""From settings to a running engine: the one file that knows every layer."""

from __future__ import annotations

import torch

from tessera.attention.registry import leftover_warnings
from tessera.config import EngineConfig
from tessera.engine.engine import Engine
from tessera.errors import ConfigError
from tessera.log import logger
from tessera.model.registry import load_spec, num_weight_bytes
from tessera.model.source import ModelSource, find_model
from tessera.model.spec import ModelSpec
from tessera.runner.device import choose_device, choose_dtype, device_name, dtype_name
from tessera.runner.executor import Capacity, Executor
from tessera.runner.memory import keep_freed_memory
from tessera.scheduler.pages import PagePool
from tessera.scheduler.scheduler import Scheduler, SchedulerLimits
from tessera.types import EngineInfo

SMALL_WEIGHT_BYTES = 4_000_000_000
"""Weights of fewer bytes are of a small model, see `token_budget`."""


def build_engine(config: EngineConfig, *, progress: bool = False) -> Engine:
    """Load the model and return an engine that is ready; raises a TesseraError that says why it cannot.

    `progress` shows a bar while weights are read.
    """
    config.check()
    for warning in leftover_warnings():
        logger.warning("%s", warning)
    source = find_model(config.model)
    spec = load_spec(source)
    _check_context(config, spec)
    device = choose_device(config.device.device)
    dtype = choose_dtype(config.model.dtype, spec.dtype, device)
    if device.type == "cpu" and dtype is torch.float16:
        logger.warning("float16 on a CPU is emulated and many times slower than float32: use --dtype float32")
    if device.type == "cpu":
        keep_freed_memory()
    if config.device.cpu_threads is not None:
        torch.set_num_threads(config.device.cpu_threads)
    budget = token_budget(config, device.type, num_weight_bytes(spec, dtype, device))
    executor = Executor(config, source, spec, device, dtype)
    capacity = executor.start(max_num_batched_tokens=budget, progress=progress)
    resolved = config.resolve(
        device=device.type,
        dtype=dtype_name(dtype),
        max_model_len=capacity.max_model_len,
        page_size=capacity.page_size,
        max_num_batched_tokens=budget,
    )
    scheduler = _build_scheduler(resolved, capacity, spec, budget)
    info = _describe(resolved, capacity, source, spec, device_name(device), budget)
    overlap = device.type == "cuda" if config.scheduler.overlap is None else config.scheduler.overlap
    return Engine(executor, scheduler, info, config.model.seed, overlap=overlap)


def token_budget(config: EngineConfig, device: str, num_weight_bytes: int) -> int:
    """Most tokens of a step on a device type, for a model of so many bytes: as is asked for, or what suits them.

    With fewer but larger steps a small model's prompts wait less for the host (on one machine with an H200 those of
    Qwen3-0.6B were in after 0.45 s in place of 0.72). Those of a larger one would keep decodes waiting.
    """
    if config.scheduler.max_num_batched_tokens is not None:
        return config.scheduler.max_num_batched_tokens
    if device != "cuda":
        return 1024
    return 16384 if num_weight_bytes < SMALL_WEIGHT_BYTES else 8192


def _check_context(config: EngineConfig, spec: ModelSpec) -> None:
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_position:
        raise ConfigError(
            f"--max-model-len {wanted} is more than the {spec.max_position} positions the model was made for",
            f"use --max-model-len {spec.max_position} or less",
        )


def _build_scheduler(config: EngineConfig, capacity: Capacity, spec: ModelSpec, budget: int) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=capacity.max_model_len,
        page_size=capacity.page_size,
        prefix_caching=config.cache.enable_prefix_caching,
    )
    return Scheduler(limits, PagePool(capacity.num_pages), frozenset(spec.eos_token_ids))


def _describe(
    config: EngineConfig, capacity: Capacity, source: ModelSource, spec: ModelSpec, device: str, budget: int
) -> EngineInfo:
    return EngineInfo(
        model=config.model.served_model_name or source.name,
        architecture=spec.architecture,
        dtype=config.model.dtype,
        device=device,
        vocab_size=spec.vocab_size,
        max_model_len=capacity.max_model_len,
        eos_token_ids=list(spec.eos_token_ids),
        page_size=capacity.page_size,
        num_pages=capacity.num_pages,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=budget,
        attention=capacity.attention,
        load_seconds=capacity.load_seconds,
        num_four_bit_layers=capacity.num_four_bit_layers,
    )
