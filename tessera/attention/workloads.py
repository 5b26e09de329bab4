"""Named workloads, and inputs made for them: shuffled pages, with stale garbage wherever no live token lies.

One source for everything that calls a backend outside a model: tests, `verify`, the self-test at load,
measurement and benchmarks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase, Shape
from tessera.attention.reference import reference_attention

TOLERANCE = {torch.float32: 6e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Greatest error, absolute plus relative, of an answer against the oracle; values are drawn from N(0, 1)."""


@dataclass(frozen=True)
class Workload:
    """(q_len, kv_len) of each sequence, and what the layer asks for."""

    lens: tuple[tuple[int, int], ...]
    window: int | None = None
    shared_tokens: int = 0
    """Tokens at the start that all sequences have in common, in the same pages."""
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True
    query_scale: float = 1.0
    """Multiplies the queries: large logits."""

    @property
    def max_q_len(self) -> int:
        """Most new tokens of a sequence."""
        return max((q_len for q_len, _ in self.lens), default=0)

    def bind(self, phase: Phase, shape: Shape) -> Shape:
        """The shape that this workload asks of a backend, where `shape` gives heads, type, device and pages."""
        return replace(
            shape,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks,
            causal=self.causal and phase is not Phase.VISION,
            page_size=None if phase is Phase.VISION else shape.page_size,
        )


DECODES = {
    "one_token": Workload(((1, 1),)),
    "decode_only": Workload(((1, 7), (1, 64), (1, 65), (1, 200), (1, 66), (1, 1))),
    "long_context": Workload(((1, 3000), (1, 5), (1, 2999))),
    "shared_pages": Workload(((1, 100), (1, 131), (1, 97)), shared_tokens=64),
    "padding_rows": Workload(((1, 20), (1, 70), (1, 0), (1, 0))),
    "large_logits": Workload(((1, 90), (1, 300)), query_scale=30.0),
    "window_longer_than_context": Workload(((1, 9), (1, 40)), window=4096),
    "window_shorter_than_context": Workload(((1, 9), (1, 16), (1, 17), (1, 300), (1, 2)), window=16),
    "window_of_one": Workload(((1, 30), (1, 1)), window=1),
    "soft_cap": Workload(((1, 9), (1, 200)), soft_cap=5.0, query_scale=4.0),
    "sinks": Workload(((1, 9), (1, 200), (1, 1)), sinks=True),
    "sinks_with_window": Workload(((1, 9), (1, 200), (1, 1)), sinks=True, window=16),
}
DRAFTS = {
    "drafts_of_2": Workload(((2, 2), (2, 70), (2, 129), (2, 300))),
    "drafts_of_5": Workload(((5, 5), (5, 64), (5, 65), (5, 700))),
    "drafts_of_16": Workload(((16, 16), (16, 17), (16, 300))),
    "ragged_drafts": Workload(((3, 40), (1, 1), (16, 500), (2, 3), (7, 70))),
    "drafts_and_padding": Workload(((4, 20), (2, 70), (4, 0), (1, 0))),
    "drafts_with_window": Workload(((5, 9), (5, 16), (5, 17), (3, 300), (2, 2)), window=16),
    "drafts_with_wide_window": Workload(((5, 700), (5, 300)), window=290),
    "drafts_with_soft_cap": Workload(((5, 9), (3, 200)), soft_cap=5.0, query_scale=4.0),
    "drafts_with_sinks": Workload(((5, 9), (3, 200), (1, 1)), sinks=True),
    "drafts_with_large_logits": Workload(((5, 90), (2, 300)), query_scale=30.0),
    "drafts_both_ways": Workload(((5, 9), (3, 200)), causal=False),
}
"""DECODE of several new tokens a sequence, which backends serve whose limits allow so many."""
PREFILLS = {
    "one_token": Workload(((1, 1),)),
    "ragged": Workload(((33, 33), (2, 2), (129, 129), (1, 1), (16, 16))),
    "chunk_with_prefix": Workload(((5, 37), (64, 65), (300, 700), (2, 2))),
    "one_token_chunk": Workload(((1, 50), (3, 3))),
    "long_context": Workload(((20, 2500),)),
    "shared_pages": Workload(((36, 100), (67, 131)), shared_tokens=64),
    "large_logits": Workload(((90, 90), (40, 120)), query_scale=30.0),
    "window_shorter_than_prompt": Workload(((100, 100), (17, 17), (600, 600)), window=16),
    "window_equals_prompt": Workload(((20, 20), (19, 19), (21, 21)), window=20),
    "window_and_a_row_past_a_tile": Workload(((129, 129), (65, 65), (65, 193)), window=50),
    "window_with_chunk": Workload(((40, 100), (10, 500), (5, 12)), window=33),
    "soft_cap": Workload(((50, 50), (20, 90)), soft_cap=5.0, query_scale=4.0),
    "sinks": Workload(((50, 50), (20, 90), (1, 1)), sinks=True),
    "sinks_with_window": Workload(((50, 50), (20, 90)), sinks=True, window=16),
    "bidirectional": Workload(((50, 50), (20, 20), (1, 1), (130, 130)), causal=False),
    # With two key heads more pieces than any GPU so far has multiprocessors, so that some take a second one.
    "many_sequences": Workload(tuple((1 + 7 * i % 40, 1 + 7 * i % 40 + 5 * (i % 3)) for i in range(100))),
}
VISIONS = {
    "one_patch": Workload(((1, 1),)),
    "one_image": Workload(((256, 256),)),
    "ragged": Workload(((64, 64), (196, 196), (1, 1), (333, 333), (16, 16))),
    "many_windows": Workload(((64, 64),) * 12),
    "large_logits": Workload(((100, 100), (60, 60)), query_scale=30.0),
}
WORKLOADS = {Phase.PREFILL: PREFILLS, Phase.DECODE: DECODES, Phase.VISION: VISIONS}


@dataclass(frozen=True)
class Case:
    """One layer's call, ready to be made; see `AttentionBackend.run` for the tensors."""

    phase: Phase
    shape: Shape
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None = None

    def answer(self, backend: type[AttentionBackend[Any]]) -> Tensor:
        """What `backend`, newly bound, answers."""
        return self.answer_of(backend(self.phase, self.shape))

    def answer_of(self, bound: AttentionBackend[Any]) -> Tensor:
        """What a bound backend answers."""
        return bound.run(bound.plan(self.batch), self.q, self.k, self.v, self.sinks)

    def reference(self) -> Tensor:
        """The oracle's answer in float64."""
        return reference_attention(self.phase, self.shape, self.batch, self.q, self.k, self.v, self.sinks)

    def real_rows(self) -> Tensor:
        """[tokens] bool: the rows that are not padding."""
        real = [
            kv_len > 0 for q_len, kv_len in zip(self.batch.q_lens_cpu, self.batch.kv_lens_cpu) for _ in range(q_len)
        ]
        return torch.tensor(real, device=self.q.device)

    def problems(self, answer: Tensor) -> list[str]:
        """What is wrong with an answer, as sentences; empty if nothing is."""
        if answer.shape != self.q.shape or answer.dtype != self.q.dtype:
            return [f"returned {answer.dtype} {tuple(answer.shape)}, not {self.q.dtype} {tuple(self.q.shape)}"]
        if not answer.isfinite().all():
            return [f"{int((~answer.isfinite()).any(-1).any(-1).sum())} of {len(answer)} rows are not finite"]
        real, tolerance = self.real_rows(), TOLERANCE[self.shape.dtype]
        error, expected = (answer.double() - (reference := self.reference()))[real].abs(), reference[real].abs()
        excess = (error - tolerance * (1 + expected)).amax() if len(error) else torch.tensor(-1.0)
        if excess > 0:
            return [f"error {float(error.amax()):.2e}, allowed are {tolerance:.0e} absolute and relative"]
        return []


def make_case(phase: Phase, workload: Workload, shape: Shape, *, seed: int = 0, ordered_pages: bool = False) -> Case:
    """Inputs for a workload; live values depend on the seed, garbage is large and everywhere else."""
    shape = workload.bind(phase, shape)
    generator = torch.Generator().manual_seed(seed)
    device, dtype = shape.device_type, shape.dtype
    tokens = sum(q_len for q_len, _ in workload.lens)
    q = torch.randn(tokens, shape.num_q_heads, shape.head_dim, generator=generator) * workload.query_scale
    sinks = torch.randn(shape.num_q_heads, generator=generator).to(device) if shape.sinks else None
    if phase is Phase.VISION:
        num_pages, packed = 0, (tokens, shape.num_kv_heads, shape.head_dim)
        k, v = (torch.randn(packed, generator=generator).to(device, dtype) for _ in range(2))
        table = torch.zeros(len(workload.lens), 0, dtype=torch.int32)
    else:
        table, k, v = _make_pools(workload, shape, generator, ordered_pages)
        num_pages = len(k)
    return Case(phase, shape, make_batch(workload.lens, table, num_pages, device), q.to(device, dtype), k, v, sinks)


def make_batch(lens: tuple[tuple[int, int], ...], table: Tensor, num_pages: int, device: str = "cpu") -> Batch:
    """A batch of sequences of these (q_len, kv_len) that hold the pages of `table` [seqs, pages], of `num_pages`."""
    q_lens, kv_lens = [q_len for q_len, _ in lens], [kv_len for _, kv_len in lens]
    return Batch(
        q_lens_cpu=q_lens,
        kv_lens_cpu=kv_lens,
        cu_q_lens=torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32, device=device),
        kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        page_table=table.to(device),
        max_q_len=max(q_lens),
        max_kv_len=max(kv_lens),
        num_pages=num_pages,
    )


def workload_seed(*parts: object) -> int:
    """The same seed for the same parts in every process."""
    return zlib.crc32(repr(parts).encode())


def _make_pools(
    workload: Workload, shape: Shape, generator: torch.Generator, ordered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    assert shape.page_size is not None
    table, num_pages = _make_page_table(workload, shape.page_size, generator, ordered)
    live = _live_slots(workload, table, shape.page_size, num_pages)[:, :, None, None]
    pools = []
    for _ in range(2):
        pool = torch.randn(num_pages, shape.page_size, shape.num_kv_heads, shape.head_dim, generator=generator)
        pools.append(torch.where(live, pool, pool * 1000).to(shape.device_type, shape.dtype))
    return table, pools[0], pools[1]


def _make_page_table(
    workload: Workload, page_size: int, generator: torch.Generator, ordered: bool
) -> tuple[Tensor, int]:
    """[seqs, pages] int32, and the size of a pool that has a few pages more than are held."""
    shared = workload.shared_tokens // page_size
    counts = [-(-kv_len // page_size) for _, kv_len in workload.lens]
    num_pages = sum(counts) + shared + 3
    free = list(range(num_pages)) if ordered else torch.randperm(num_pages, generator=generator).tolist()
    common, free = free[:shared], free[shared:]
    table = torch.zeros(len(counts), max([1, *counts]), dtype=torch.int32)
    for row, count in zip(table, counts):
        own, free = free[: count - shared], free[max(0, count - shared) :]
        row[:count] = torch.tensor([*common[:count], *own], dtype=torch.int32)
    return table, num_pages


def _live_slots(workload: Workload, table: Tensor, page_size: int, num_pages: int) -> Tensor:
    """[pages, page_size] bool"""
    live = torch.zeros(num_pages * page_size, dtype=torch.bool)
    for row, (_, kv_len) in zip(table.long(), workload.lens):
        position = torch.arange(kv_len)
        live[row[position // page_size] * page_size + position % page_size] = True
    return live.view(num_pages, page_size)
