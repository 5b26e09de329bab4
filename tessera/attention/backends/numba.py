"""numba: our own decode kernel for a CPU, compiled when it is first used and cached on disk by Numba.

Torch's kernel wants keys of one length in one tensor, so pages are copied together first; this one
reads every key and value once, where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from tessera.attention.contract import AttentionBackend, Batch, Claim, Limits, Phase, Shape

SYMBOL = "tessera::paged_decode_cpu"


@dataclass(frozen=True)
class NumbaPlan:
    """One step's work, see `tessera.kernels.paged_decode_cpu.compile_paged_decode`."""

    page_table: NDArray[np.int32]
    chunks: NDArray[np.int64]
    parts: NDArray[np.int64]
    first_chunks: NDArray[np.int64]
    workspace: tuple[Any, ...]


class Numba(AttentionBackend[NumbaPlan]):
    """Flash-Decoding over pages on a CPU."""

    name: ClassVar[str] = "numba"
    needs: ClassVar[tuple[str, ...]] = ("numba",)
    packages: ClassVar[tuple[str, ...]] = ("numba", "llvmlite", "torch")
    install: ClassVar[str | None] = "pip install 'tessera-llm[cpu]'"
    limits: ClassVar[dict[Phase, Limits]] = {
        Phase.DECODE: Limits(
            dtypes=(torch.float32, torch.bfloat16),
            devices=("cpu",),
            windows=True,
            soft_caps=True,
            sinks=True,
            batch_invariant=("cpu",),
        )
    }

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """Compiled code has no operator: the call is marked by hand, and no operator that attends is seen."""
        return Claim(must=(SYMBOL,), must_not=("scaled_dot_product", "aten::bmm", "aten::_softmax"))

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        import numba

        from tessera.kernels import paged_decode_cpu

        self._kernels = paged_decode_cpu
        self._kernel = paged_decode_cpu.compile_paged_decode(shape.head_dim, shape.group)
        self._num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        numba.set_num_threads(self._num_threads)
        self._no_sinks = np.empty(0, np.float32)
        self._reserve(64)

    def plan(self, batch: Batch) -> NumbaPlan:
        """Cut sequences into chunks, and share these among the threads."""
        window = self.shape.window
        first_keys = [0 if window is None else max(0, kv_len - window) for kv_len in batch.kv_lens_cpu]
        chunks, first_chunks = self._kernels.cut_into_chunks(first_keys, batch.kv_lens_cpu)
        if len(chunks) > self._num_chunks:
            self._reserve(2 * len(chunks))
        parts = self._kernels.share_among_threads(chunks, self._num_threads)
        return NumbaPlan(batch.page_table.numpy(), chunks, parts, first_chunks, self._workspace)

    def run(self, plan: NumbaPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """One call of the compiled kernel."""
        out = torch.empty(q.shape, dtype=torch.float32)
        with record_function(SYMBOL):
            self._kernel(
                q.float().contiguous().numpy(),
                _as_array(k),
                _as_array(v),
                plan.page_table,
                plan.chunks,
                plan.parts,
                plan.first_chunks,
                np.float32(self.shape.scale),
                np.float32(self.shape.soft_cap or 0.0),
                self._no_sinks if sinks is None else sinks.float().numpy(),
                plan.workspace,
                out.numpy(),
            )
        return out.to(q.dtype)

    def _reserve(self, num_chunks: int) -> None:
        self._num_chunks = num_chunks
        self._workspace = self._kernels.make_workspace(
            num_chunks, self._num_threads, self.shape.num_q_heads, self.shape.head_dim
        )


def _as_array(pages: Tensor) -> NDArray[Any]:
    """The same memory for Numba, which knows no bfloat16."""
    array: NDArray[Any] = (pages.view(torch.uint16) if pages.dtype == torch.bfloat16 else pages).numpy()
    return array
