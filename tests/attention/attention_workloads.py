"""Named workloads, and pages filled for them: shuffled, with stale garbage wherever no live token lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.attention.reference import reference_attention

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True)
class Workload:
    """(q_len, kv_len) of each sequence, and the window of the layer."""

    lens: tuple[tuple[int, int], ...]
    window: int | None = None
    shared_tokens: int = 0
    """Tokens at the start that all sequences have in common, in the same pages."""


DECODES = {
    "one_token": Workload(((1, 1),)),
    "decode_only": Workload(((1, 7), (1, 64), (1, 65), (1, 200), (1, 66), (1, 1))),
    "long_context": Workload(((1, 3000), (1, 5), (1, 2999))),
    "shared_prefix": Workload(((1, 100), (1, 131), (1, 97)), shared_tokens=64),
    "window_longer_than_context": Workload(((1, 9), (1, 40)), window=4096),
    "window_shorter_than_context": Workload(((1, 9), (1, 16), (1, 17), (1, 300), (1, 2)), window=16),
    "window_of_one": Workload(((1, 30), (1, 1)), window=1),
}
PREFILLS = {
    "one_token": Workload(((1, 1),)),
    "ragged_prefill": Workload(((33, 33), (2, 2), (129, 129), (1, 1), (16, 16))),
    "chunk_with_prefix": Workload(((5, 37), (64, 65), (300, 700), (2, 2))),
    "one_token_chunk": Workload(((1, 50), (3, 3))),
    "long_context": Workload(((20, 2500),)),
    "shared_prefix": Workload(((36, 100), (67, 131)), shared_tokens=64),
    "window_shorter_than_prompt": Workload(((100, 100), (17, 17), (600, 600)), window=16),
    "window_equals_prompt": Workload(((20, 20), (19, 19), (21, 21)), window=20),
    "window_and_a_row_past_a_tile": Workload(((129, 129), (65, 65), (65, 193)), window=50),
    "window_with_chunk": Workload(((40, 100), (10, 500), (5, 12)), window=33),
}
WORKLOADS = {Phase.DECODE: DECODES, Phase.PREFILL: PREFILLS}


@dataclass(frozen=True)
class Case:
    """One layer's call, ready to be made."""

    shape: Shape
    batch: Batch
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor

    def answer(self, backend: type[AttentionBackend[Any]], phase: Phase) -> Tensor:
        bound = backend(phase, self.shape)
        return bound.run(bound.plan(self.batch), self.q, self.k_pages, self.v_pages)

    def reference(self) -> Tensor:
        return reference_attention(self.shape, self.batch, self.q, self.k_pages, self.v_pages)

    def check(self, backend: type[AttentionBackend[Any]], phase: Phase) -> None:
        """The backend's answer is the oracle's, within the rounding of the type."""
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[self.shape.dtype]
        answer = self.answer(backend, phase)
        assert answer.dtype == self.q.dtype
        torch.testing.assert_close(answer.double(), self.reference(), atol=tolerance, rtol=tolerance)


def make_shape(
    *,
    q_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int | None = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    window: int | None = None,
) -> Shape:
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return Shape(q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, device, capability, page_size, window)


def make_case(workload: Workload, shape: Shape, *, seed: int = 0, ordered_pages: bool = False) -> Case:
    """Pages and queries for a workload; live values depend on the seed, garbage is large and everywhere else."""
    assert shape.page_size is not None
    generator = torch.Generator().manual_seed(seed)
    table, num_pages = make_page_table(workload, shape.page_size, generator, ordered_pages)
    pools = []
    for _ in range(2):
        pool = torch.randn(num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, generator=generator)
        live = live_slots(workload, table, shape.page_size, num_pages)
        pools.append(torch.where(live[:, :, None, None], pool, pool * 1000).to(shape.device_type, shape.dtype))
    tokens = sum(q_len for q_len, _ in workload.lens)
    q = torch.randn(tokens, shape.num_q_heads, shape.head_dim, generator=generator)
    q = q.to(shape.device_type, shape.dtype)
    return Case(shape, make_batch(workload.lens, table, shape.device_type), q, pools[0], pools[1])


def make_batch(lens: tuple[tuple[int, int], ...], table: Tensor, device: str = "cpu") -> Batch:
    q_lens, kv_lens = [q_len for q_len, _ in lens], [kv_len for _, kv_len in lens]
    return Batch(
        q_lens_cpu=q_lens,
        kv_lens_cpu=kv_lens,
        cu_q_lens=torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32, device=device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        page_table=table.to(device),
        max_q_len=max(q_lens),
        max_kv_len=max(kv_lens),
    )


def make_page_table(
    workload: Workload, page_size: int, generator: torch.Generator, ordered: bool
) -> tuple[Tensor, int]:
    """[seqs, pages] int32, and the size of a pool that has a few pages more than are held."""
    shared = workload.shared_tokens // page_size
    counts = [-(-kv_len // page_size) for _, kv_len in workload.lens]
    num_pages = sum(counts) + shared + 3
    free = list(range(num_pages)) if ordered else torch.randperm(num_pages, generator=generator).tolist()
    common, free = free[:shared], free[shared:]
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, count in zip(table, counts):
        own, free = free[: count - shared], free[max(0, count - shared) :]
        row[:count] = torch.tensor([*common[:count], *own], dtype=torch.int32)
    return table, num_pages


def live_slots(workload: Workload, table: Tensor, page_size: int, num_pages: int) -> Tensor:
    """[pages, page_size] bool"""
    live = torch.zeros(num_pages * page_size, dtype=torch.bool)
    for row, (_, kv_len) in zip(table.long(), workload.lens):
        position = torch.arange(kv_len)
        live[row[position // page_size] * page_size + position % page_size] = True
    return live.view(num_pages, page_size)
