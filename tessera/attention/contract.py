"""The contract between the engine and an attention library.

A backend is one class, bound to one phase and one shape. It says as data (`Limits`) what it can
serve, plans once a step on the host (`plan`), and launches kernels once a layer (`run`). It reads
pages and never writes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import import_module
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")


class Phase(StrEnum):
    """What attention is asked for: each phase may be served by another backend."""

    PREFILL = "prefill"
    """Several new tokens a sequence, causal, keys and values in pages."""
    DECODE = "decode"
    """One new token a sequence, keys and values in pages."""


@dataclass(frozen=True)
class Shape:
    """What a layer of one model on one rank asks of attention in one phase; fixed at start-up."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """Multiplies q·k before the softmax."""
    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) off CUDA."""
    page_size: int | None = None
    window: int | None = None
    """A token sees itself and `window - 1` tokens before it; None: all before it."""


@dataclass(frozen=True)
class Limits:
    """What a backend supports in one phase: data, so that selection, docs and tests all read it."""

    dtypes: Container[torch.dtype]
    head_dims: Container[int] = range(1, 1025)
    page_sizes: Container[int] = range(1, 4097)
    devices: Container[str] = ("cuda",)
    min_capability: tuple[int, int] = (0, 0)
    windows: bool = False
    """Whether a sliding window is honoured."""
    graphs: bool = False
    """Whether a CUDA graph may record `run`."""

    def problems(self, shape: Shape) -> list[str]:
        """Each thing `shape` asks for that is not within these limits, as a sentence."""
        asked: list[tuple[str, object, Container[object]]] = [
            ("dtype", shape.dtype, self.dtypes),
            ("page_size", shape.page_size, self.page_sizes),
            ("device", shape.device_type, self.devices),
            ("head_dim", shape.head_dim, self.head_dims),
        ]
        bad = [f"{what} {value} not in {ok}" for what, value, ok in asked if value is not None and value not in ok]
        if shape.capability < self.min_capability:
            bad.append(f"needs compute capability {self.min_capability}, has {shape.capability}")
        if shape.window is not None and not self.windows:
            bad.append(f"no sliding window, the model has one of {shape.window}")
        return bad


@dataclass(frozen=True)
class Batch:
    """One phase's sequences in one step.

    Tensors are slices of buffers that the runner owns, so their addresses outlive the step; the
    `_cpu` copies spare every backend a device sync. New tokens of a sequence are its last: query i of
    a sequence stands at position `kv_len - q_len + i`.
    """

    q_lens_cpu: list[int]
    kv_lens_cpu: list[int]
    """Tokens of each sequence in the cache, this step's included."""
    cu_q_lens: Tensor
    """[seqs + 1] int32: prefix sums of q_lens, from 0."""
    kv_lens: Tensor
    """[seqs] int32"""
    page_table: Tensor
    """[seqs, max_pages] int32; entries past a sequence's pages are 0 and must not be relied on."""
    max_q_len: int
    max_kv_len: int


class AttentionBackend(ABC, Generic[Plan]):
    """One library's attention, bound to one phase and one shape."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules that must import."""
    limits: ClassVar[Mapping[Phase, Limits]]
    """A phase left out is not supported."""

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """Every reason why this backend cannot serve `phase`; empty means it can."""
        if phase not in cls.limits:
            return [f"no {phase} kernel"]
        missing = [error for module in cls.needs if (error := import_error(module))]
        return missing + cls.limits[phase].problems(shape)

    def __init__(self, phase: Phase, shape: Shape) -> None:
        """Bind to `phase` and `shape`; workspaces are allocated here, never later."""
        self.phase, self.shape = phase, shape

    @abstractmethod
    def plan(self, batch: Batch) -> Plan:
        """Prepare one step, before layer 0: the only place that may sync, allocate or tune."""

    @abstractmethod
    def run(self, plan: Plan, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """Attend in one layer: launches kernels and nothing else, so that a graph may record it.

        q                 [tokens, q_heads, head_dim], the batch's sequences packed one after another
        k_pages, v_pages  [pages, page_size, kv_heads, head_dim], this step's tokens already written
        returns           [tokens, q_heads, head_dim]
        """


@cache
def import_error(module: str) -> str | None:
    """Why `module` does not import, in a sentence; None where it does."""
    try:
        import_module(module)
    except Exception as error:  # a wheel built for another torch raises OSError and worse
        return f"import {module}: {error}"
    return None
