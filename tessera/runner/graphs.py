"""Decode steps as CUDA graphs: recorded once for each number of sequences, replayed with other numbers in place.

A step of one token a sequence launches some hundred small kernels, which takes the host longer than the device. As a
graph it is one launch. Steps of fewer sequences than were recorded are padded; whatever their lengths, the same
graph serves, for lengths and pages are read from tensors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase
from tessera.attention.cuda import capture
from tessera.attention.step import Attention, Bucket, StepAttention
from tessera.log import logger
from tessera.model.language_model import LanguageModel
from tessera.runner.inputs import HostInputs, LastSampled
from tessera.runner.parameters import SamplingRows
from tessera.runner.sampler import Sampled, Sampler
from tessera.runner.transfer import to_device
from tessera.step import Step

PADDING_SLOT = -1
LENGTHS = (512, 2048, 8192, 32768)
"""Longest sequences that graphs are recorded for, before the model's own longest: a backend that is told of shorter
ones cuts them into fewer pieces."""


@dataclass(frozen=True)
class GraphLimits:
    """The largest step that a graph will be replayed with."""

    max_num_seqs: int
    max_model_len: int
    page_size: int
    num_pages: int

    def sizes(self) -> list[int]:
        """Numbers of sequences to record: close enough that at most a fifth of a step, or three rows, is padding."""
        sizes = [1, 2, 4]
        while sizes[-1] < self.max_num_seqs:
            sizes.append(sizes[-1] + max(4, sizes[-1] // 32 * 8))
        return [size for size in sizes if size < self.max_num_seqs] + [self.max_num_seqs]

    def longest(self, kv_len: int) -> int:
        """The longest sequence that a graph for one of `kv_len` tokens is recorded for."""
        return min(next((each for each in LENGTHS if each >= kv_len), self.max_model_len), self.max_model_len)


class StaticInputs:
    """What graphs read, at addresses that stay; a graph of fewer sequences reads the first rows."""

    def __init__(self, limits: GraphLimits, device: torch.device) -> None:
        rows = limits.max_num_seqs
        self._limits, self._device = limits, device
        self._numbers = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.token_ids, self.sources, self.positions, self.slots, self.kv_lens64 = self._numbers
        self.kv_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.cu_q_lens = torch.arange(rows + 1, dtype=torch.int32, device=device)
        most_pages = -(-limits.max_model_len // limits.page_size)
        self.page_table = torch.zeros(rows, most_pages, dtype=torch.int32, device=device)
        self.parameters = torch.zeros(rows, 5, dtype=torch.float64, device=device)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=device)
        """Token ids of the step before."""
        self._sampling = SamplingRows.of([])
        self.clear()

    def batch(self, rows: int, kv_lens_cpu: list[int], max_kv_len: int) -> Batch:
        """The first `rows` of everything as a batch of decodes."""
        return Batch(
            q_lens_cpu=[1] * rows,
            kv_lens_cpu=kv_lens_cpu,
            cu_q_lens=self.cu_q_lens[: rows + 1],
            kv_lens=self.kv_lens[:rows],
            page_table=self.page_table[:rows],
            max_q_len=1,
            max_kv_len=max_kv_len,
            num_pages=self._limits.num_pages,
        )

    def clear(self) -> None:
        """Nothing but padding: a step that writes to no page."""
        self._numbers.zero_()
        self.sources.fill_(-1)
        self.slots.fill_(PADDING_SLOT)
        self.kv_lens.zero_()

    def write(self, host: HostInputs, rows: int) -> None:
        """A step of at most `rows` sequences, padded to that number."""
        count = len(host.q_lens)
        numbers = np.zeros((5, rows), np.int64)
        numbers[1, count:], numbers[3, count:] = -1, PADDING_SLOT
        for row, values in enumerate((host.token_ids, host.sources, host.positions, host.slots, host.kv_lens)):
            numbers[row, :count] = values
        width = -(-int(host.kv_lens.max()) // self._limits.page_size)  # no entry behind is read
        there, table = to_device([numbers, host.table[:, :width]], self._device)
        self._numbers[:, :rows].copy_(there)
        self.page_table[:count, :width].copy_(table)

    def write_parameters(self, step: Step) -> bool:
        """How each row is sampled; where all are greedy, as in the step before, nothing has to be written.

        Whether all rows are plain: see `SamplingRows.all_plain`.
        """
        before, self._sampling = self._sampling, self._sampling.following(step.sampling)
        if not self._sampling.all_greedy:
            (table,) = to_device([self._sampling.parameters(step.kv_lens)], self._device)
            self.parameters[: len(table)].copy_(table)
        elif not before.all_greedy:
            self.parameters.zero_()  # all rows, for a later step of more may be greedy too and write nothing
        return self._sampling.all_plain(step.kv_lens)


@dataclass(frozen=True)
class _Graph:
    """One recorded step."""

    graph: torch.cuda.CUDAGraph
    attend: StepAttention
    hidden: Tensor
    """[rows, hidden_size], of the last replay. Logits are not held: a tensor that is could not be reused by other
    graphs, and those of a large vocabulary add up to gigabytes."""


class DecodeGraphs:
    """Replays steps of decodes; records a graph the first time that its size is needed.

    k_pages, v_pages  as in Runner
    sampler           a fused one, for sampling is part of the graph
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: Attention,
        pools: tuple[Items[Tensor], Items[Tensor]],
        sampler: Sampler,
        limits: GraphLimits,
    ) -> None:
        self._model, self._attention, self._pools, self._sampler = model, attention, pools, sampler
        self._limits, self._sizes = limits, limits.sizes()
        self._static = StaticInputs(limits, pools[0][0].device)
        self._graphs: dict[tuple[int, int, tuple[AttentionBackend[Any], ...]], _Graph] = {}
        self._memory: Any = torch.cuda.graph_pool_handle()

    @staticmethod
    def refused(attention: Attention, sampler: Sampler) -> list[str]:
        """Why steps of some size cannot be recorded; [] where all can."""
        reasons = [] if sampler.fused else ["tokens are not sampled by the fused kernel"]
        for backends in attention.bound(Phase.DECODE):
            reasons += attention.graphs_refused(Phase.DECODE, backends)
        return list(dict.fromkeys(reasons))

    def serves(self, step: Step, host: HostInputs) -> bool:
        """Whether a step is of decodes alone, which all sample, attended to by backends that a graph may record."""
        if not bool((host.q_lens == 1).all() and host.samples.all()):
            return False
        if len(host.q_lens) > self._limits.max_num_seqs or step.owed_logprobs:
            return False
        return not self._attention.graphs_refused(Phase.DECODE, self._serving(host))

    def begin(self, step: Step, host: HostInputs, last: LastSampled | None) -> Sampled:
        """Replay the graph of a step that it `serves`; what is sampled stands in the same memory step after step."""
        static, count = self._static, len(host.q_lens)
        rows = next(size for size in self._sizes if size >= count)
        kv_lens = host.kv_lens.tolist()
        graph = self._graph(rows, self._limits.longest(max(kv_lens)), self._serving(host))
        if last is not None and last.token_ids.data_ptr() != static.sampled.data_ptr():
            static.sampled[: len(last.token_ids)].copy_(last.token_ids)
        static.write(host, rows)
        plain = static.write_parameters(step)
        graph.attend.update(static.batch(rows, kv_lens + [0] * (rows - count), max(kv_lens)))
        graph.graph.replay()
        if plain:
            return Sampled(static.sampled[:count], step.sampling)
        logits = self._model.logits(graph.hidden[:count])  # a second time, for those who ask more than the token
        sampled = self._sampler.sample(logits, step.sampling)
        static.sampled[:count].copy_(sampled.token_ids)
        return sampled

    def _serving(self, host: HostInputs) -> tuple[AttentionBackend[Any], ...]:
        return self._attention.serving(Phase.DECODE, Bucket(len(host.q_lens), 1, int(host.kv_lens.max())))

    def _graph(self, rows: int, longest: int, backends: tuple[AttentionBackend[Any], ...]) -> _Graph:
        """The graph of so many rows of at most `longest` tokens, attended to by these."""
        found = self._graphs.get((rows, longest, backends))
        if found is None:
            started = time.perf_counter()
            found = self._graphs[rows, longest, backends] = self._capture(rows, longest, backends)
            seconds = time.perf_counter() - started
            names = ", ".join(dict.fromkeys(backend.name for backend in backends))
            logger.debug("a graph of %d x %d with %s was recorded in %.2f s", rows, longest, names, seconds)
        return found

    def _capture(self, rows: int, longest: int, backends: tuple[AttentionBackend[Any], ...]) -> _Graph:
        """Record a step; whatever compiles or chooses does so in a run before, of nothing but padding."""
        static = self._static
        sampled = static.sampled.clone()  # what the step before sampled is still wanted
        static.clear()
        batch = static.batch(rows, [longest] * rows, longest)
        batches = {Phase.DECODE: (slice(0, rows), batch)}
        attend = self._attention.begin_capture(*self._pools, static.slots[:rows], batches, {Phase.DECODE: backends})
        graph, hidden = capture(lambda: self._compute(attend, rows), lambda: self._compute(attend, rows), self._memory)
        static.sampled.copy_(sampled)
        return _Graph(graph, attend, hidden)

    def _compute(self, attend: StepAttention, rows: int) -> Tensor:
        """From what is in the static tensors to sampled tokens; returns the hidden states behind them."""
        static = self._static
        static.kv_lens[:rows].copy_(static.kv_lens64[:rows])
        sources = static.sources[:rows]
        pending = static.sampled[sources.clamp(min=0)]
        token_ids = torch.where(sources >= 0, pending, static.token_ids[:rows])
        hidden: Tensor = self._model(token_ids, static.positions[:rows], attend)
        logits = self._model.logits(hidden)
        static.sampled[:rows].copy_(self._sampler.choose_fused(logits, static.parameters[:rows]))
        return hidden
