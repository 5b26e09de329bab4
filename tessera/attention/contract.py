"""The contract between the engine and an attention library.

A backend is one class, bound to one phase and one shape. It says as data (`Limits`) what it can
serve and (`Claim`) which kernels it launches, plans once a step on the host (`plan`), and launches
kernels once a layer (`run`). It reads pages and never writes them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
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
    VISION = "vision"
    """Whole sequences of image patches, packed, without pages: every patch sees every other of its own sequence."""


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
    """Tokens a page; None in VISION, and before a size is chosen."""
    window: int | None = None
    """A token sees itself and `window - 1` tokens before it; None: all before it."""
    soft_cap: float | None = None
    """Scores become `soft_cap * tanh(score / soft_cap)`, before masks (Gemma 2)."""
    sinks: bool = False
    """Whether each query head has a learned score that joins the softmax but carries no value (gpt-oss)."""
    causal: bool = True
    """False: a token sees the tokens after it in its sequence too. Always False in VISION."""
    shared_memory: int = 0
    """Bytes of shared memory that one block may ask for; 0 off CUDA."""

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Limits:
    """What a backend supports in one phase: data, so that selection, docs and tests all read it."""

    dtypes: Container[torch.dtype]
    head_dims: Container[int] = range(1, 1025)
    padded_head_dims: Container[int] = ()
    """Those of `head_dims` that are served by padding with zeros: right, but at the cost of the padded size."""
    page_sizes: Container[int] = range(1, 4097)
    groups: Container[int] = range(1, 1025)
    """Query heads a key-value head."""
    devices: Container[str] = ("cuda",)
    min_capability: tuple[int, int] = (0, 0)
    max_capability: tuple[int, int] = (999, 0)
    shared_memory: int = 0
    """Least bytes of shared memory a block must be able to ask for, on CUDA."""
    windows: bool = False
    """Whether a sliding window is honoured."""
    soft_caps: bool = False
    """Whether a soft cap on scores is honoured."""
    sinks: bool = False
    """Whether attention sinks are honoured."""
    bidirectional: bool = False
    """Whether attention that is not causal is served over pages; VISION needs no such word."""
    graphs: bool = False
    """Whether a CUDA graph may record `run`."""
    batch_invariant: Container[str] = ()
    """The devices on which a sequence's answer has the same bits whatever else is in the batch."""
    max_q_len: int = 1
    """DECODE: most new tokens of a sequence, those drafted for it included."""

    def problems(self, shape: Shape) -> list[str]:
        """Each thing `shape` asks for that is not within these limits, as a sentence."""
        asked: list[tuple[str, object, Container[object]]] = [
            ("dtype", shape.dtype, self.dtypes),
            ("page_size", shape.page_size, self.page_sizes),
            ("device", shape.device_type, self.devices),
            ("head_dim", shape.head_dim, self.head_dims),
            ("query heads a key-value head", shape.group, self.groups),
        ]
        bad = [f"{what} {value} not in {ok}" for what, value, ok in asked if value is not None and value not in ok]
        if shape.device_type == "cuda":
            bad += self._device_problems(shape)
        if shape.window is not None and not self.windows:
            bad.append(f"no sliding window, the model has one of {shape.window}")
        if shape.soft_cap is not None and not self.soft_caps:
            bad.append(f"no soft cap, the model has one of {shape.soft_cap:g}")
        if shape.sinks and not self.sinks:
            bad.append("no attention sinks, the model has them")
        if not shape.causal and not self.bidirectional:
            bad.append("causal only, the model attends both ways")
        return bad

    def notes(self, shape: Shape) -> list[str]:
        """What a user should know although `shape` is served."""
        if shape.head_dim in self.padded_head_dims:
            return [f"head_dim {shape.head_dim} is padded"]
        return []

    def _device_problems(self, shape: Shape) -> list[str]:
        bad = []
        if shape.capability < self.min_capability:
            bad.append(f"needs compute capability {_dotted(self.min_capability)}, has {_dotted(shape.capability)}")
        if shape.capability > self.max_capability:
            bad.append(
                f"made for compute capability up to {_dotted(self.max_capability)}, has {_dotted(shape.capability)}"
            )
        if 0 < shape.shared_memory < self.shared_memory:
            bad.append(f"needs {self.shared_memory} bytes of shared memory a block, has {shape.shared_memory}")
        return bad


@dataclass(frozen=True)
class Claim:
    """Which kernels a backend says it launches, held against what a profiler saw (see `prove`).

    Patterns are regular expressions searched for in the names of CUDA kernels, on a CPU of operators.
    """

    must: tuple[str, ...]
    """Each is found in at least one name."""
    must_not: tuple[str, ...] = ()
    """None is found in any name."""


@dataclass(frozen=True)
class Batch:
    """One phase's sequences in one step.

    Tensors are slices of buffers that the runner owns, so their addresses outlive the step; the
    `_cpu` copies spare every backend a device sync. New tokens of a sequence are its last: query i of
    a sequence stands at position `kv_len - q_len + i`. In VISION q_lens and kv_lens are equal.
    """

    q_lens_cpu: list[int]
    kv_lens_cpu: list[int]
    """Tokens of each sequence in the cache, this step's included; 0 in a padding row.

    A padding row has one new token in DECODE; in the other phases, where only replays of a graph have any, none.
    """
    cu_q_lens: Tensor
    """[seqs + 1] int32: prefix sums of q_lens, from 0."""
    kv_lens: Tensor
    """[seqs] int32"""
    page_table: Tensor
    """[seqs, max_pages] int32, at least one column; entries past a sequence's pages are 0 and must not be relied on.
    [seqs, 0] in VISION."""
    max_q_len: int
    max_kv_len: int
    """The longest of `kv_lens`; while a graph is captured, the longest it will ever be replayed with."""
    num_pages: int
    """Pages of the pools that `run` will be given, held by a sequence or not; 0 in VISION."""


class AttentionBackend(ABC, Generic[Plan]):
    """One library's attention, bound to one phase and one shape."""

    name: ClassVar[str]
    """As users write it. A variant of a library is a class of its own, named `library:variant`."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Modules that must import."""
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    """Distributions whose versions decide what runs: part of every proof and of every measurement's key."""
    install: ClassVar[str | None] = None
    """What installs `needs`, for the hint: `pip install tessera-llm[flash]`."""
    limits: ClassVar[Mapping[Phase, Limits]]
    """A phase left out is not supported."""
    rung: ClassVar[str | None] = None
    """The idea that a variant stands for which exists to be compared with its better; auto never takes it."""
    options_from: str = ""
    """Where the options that kernels are compiled with come from, if there is a choice: said with why it serves."""

    @classmethod
    def reasons_against(cls, phase: Phase, shape: Shape) -> list[str]:
        """Every reason why this backend cannot serve `phase`; empty means it can."""
        if phase not in cls.limits:
            return [f"no {phase} kernel"]
        reasons = [f"{module} is not installed" for module in cls.needs if not is_installed(module)]
        asked = replace(shape, causal=True) if phase is Phase.VISION else shape  # seeing both ways is what VISION is
        reasons += cls.limits[phase].problems(asked)
        # Importing a library for another device takes seconds and adds nothing to what is known already.
        return reasons or [error for module in cls.needs if (error := import_error(module))]

    @classmethod
    def costly(cls, phase: Phase, shape: Shape) -> str | None:
        """Why first use takes many seconds here, such as a compilation that no cache holds yet; None if it does not.

        Auto leaves such a backend to be named. Only asked where nothing else is against it.
        """
        return None

    @classmethod
    @abstractmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The kernels that `run` launches in `phase` on `shape`; it must name at least one."""

    def __init__(self, phase: Phase, shape: Shape) -> None:
        """Bind to `phase` and `shape`; workspaces are allocated here, never later."""
        self.phase, self.shape = phase, shape

    @abstractmethod
    def plan(self, batch: Batch) -> Plan:
        """Prepare one step, before layer 0: the only place that may sync, allocate or tune."""

    @abstractmethod
    def run(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Attend in one layer: launches kernels and nothing else, so that a graph may record it.

        q        [tokens, q_heads, head_dim], the batch's sequences packed one after another; may be a strided
                 slice of a wider tensor, its last stride is 1
        k, v     the layer's pools, [pages, page_size, kv_heads, head_dim], this step's tokens already written;
                 in VISION the packed keys and values themselves, [tokens, kv_heads, head_dim], strided like q
        sinks    [q_heads] float32, given if and only if `shape.sinks`
        returns  [tokens, q_heads, head_dim]
        """

    def plan_capture(self, batch: Batch) -> Plan:
        """A plan for `run` to be recorded with in a CUDA graph: it stays valid for every later replay.

        `batch` has as many sequences and new tokens as will ever be replayed, and the longest `max_q_len` and
        `max_kv_len`; how the tokens are shared out among its sequences is one way of many, in PREFILL. Only backends
        whose limits say `graphs` are asked.
        """
        return self.plan(batch)

    def update_capture(self, plan: Plan, batch: Batch) -> None:
        """Before each replay: refresh whatever `plan` keeps outside the batch's tensors, rewritten in place.

        The batch has as many sequences as were captured, padding rows included.
        """


@cache
def is_installed(module: str) -> bool:
    """Whether `module` can be found, without importing more than the packages it lies in."""
    try:
        return module in sys.modules or find_spec(module) is not None
    except Exception:  # a parent package that fails to import: `import_error` tells how
        return is_installed(module.partition(".")[0]) if "." in module else False


@cache
def import_error(module: str) -> str | None:
    """Why `module` does not import, in one line; None where it does."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a wheel built for another torch raises OSError and worse
        return f"import {module} fails: {' '.join(str(error).split())[:300]}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
