"""Steps as CUDA graphs: recorded once for each size that steps are padded to, replayed with other numbers in place.

A step of one token a sequence launches some hundred small kernels, which takes the host longer than the device; so does
one with prompts that are short. As a graph it is one launch, sampling included. Whatever the lengths, the same graph
serves, for lengths and pages are read from tensors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase
from tessera.attention.cuda import capture, graph_pool
from tessera.attention.step import Attention, Bucket, StepAttention
from tessera.log import logger
from tessera.model.language_model import LanguageModel
from tessera.runner.graph_sizes import GraphLimits, GraphSize
from tessera.runner.inputs import HostInputs, LastSampled
from tessera.runner.parameters import SamplingRows
from tessera.runner.sampler import Sampled, Sampler
from tessera.runner.static_inputs import GraphInputs, StaticInputs
from tessera.runner.transfer import HostCopy, Returns
from tessera.step import Step

Backends = tuple[AttentionBackend[Any], ...]


class _Key(NamedTuple):
    """What a graph is recorded for: a size, and who attends to decodes and to prompts; () where there are none."""

    size: GraphSize
    decoding: Backends
    prefilling: Backends


class _Lens(NamedTuple):
    """What backends are told of a step's lengths on the host, padding included."""

    decodes: list[int]
    """Tokens of each in the cache."""
    prompts: list[int]
    q_lens: list[int]
    """New tokens of each prompt."""
    max_q_len: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded step."""

    graph: torch.cuda.CUDAGraph
    inputs: GraphInputs
    attend: StepAttention
    hidden: Tensor
    """[rows that may be sampled, hidden_size], of the last replay. Logits are not held: a tensor that is could not be
    reused by other graphs, and those of a large vocabulary add up to gigabytes."""
    sampled: Tensor
    """[rows that may be sampled] int64, where all graphs leave them."""


class StepGraphs:
    """Replays steps; records a graph the first time that its size is needed.

    pools    as in Runner: keys and values of every layer
    sampler  a fused one, for sampling is part of the graph
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
        self._limits, device, most = limits, pools[0][0].device, limits.max_num_seqs
        self._static, self._returns = StaticInputs(limits, device), Returns(2 * most, device)
        self._sampled = torch.zeros(2 * most, dtype=torch.int64, device=device)
        self._decode_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._graphs: dict[_Key, _Graph] = {}
        self._memory = graph_pool()
        self._sampling = SamplingRows.of([])

    @staticmethod
    def refused(attention: Attention, sampler: Sampler) -> list[str]:
        """Why steps of some size cannot be recorded; [] where all can."""
        reasons = [] if sampler.fused else ["tokens are not sampled by the fused kernel"]
        for backends in attention.bound(Phase.DECODE):
            reasons += attention.graphs_refused(Phase.DECODE, backends)
        return list(dict.fromkeys(reasons))

    @property
    def sizes(self) -> list[GraphSize]:
        """Those that have been recorded."""
        return [key.size for key in self._graphs]

    def begin(self, step: Step, host: HostInputs, last: LastSampled | None) -> Sampled | HostCopy | None:
        """Replay the graph of a step; what is sampled stands in the same memory step after step.

        returns  where nothing is sampled, anything that is copied when the step is done; None where no graph serves
                 the step, and nothing has been done
        """
        kv_lens = host.kv_lens.tolist()
        key = self._key(step, host, kv_lens)
        if key is None:
            return None
        graph = self._graphs.get(key)
        if graph is None:
            if self._refuses(key):
                return None
            graph = self._graphs[key] = self._record(key)
        if last is not None and last.token_ids.data_ptr() != self._sampled.data_ptr():
            self._sampled[: len(last.token_ids)].copy_(last.token_ids)
        count = len(step.sampling)
        num_tokens = step.kv_lens if count == len(kv_lens) else step.kv_lens[step.samples]
        self._sampling = self._sampling.following(step.sampling)
        graph.inputs.write(host, self._sampling, num_tokens)
        graph.attend.update(*(batch for _, batch in self._batches(graph.inputs, _lens(host, kv_lens, key.size))))
        graph.graph.replay()
        if not count:
            return HostCopy([graph.hidden[:1, :1]])
        if self._sampling.all_plain(num_tokens):
            return Sampled(graph.sampled, step.sampling, returns=self._returns)
        logits = self._model.logits(graph.hidden[:count])  # a second time, for those who ask more than the token
        sampled = self._sampler.sample(logits, step.sampling)
        self._sampled[:count].copy_(sampled.token_ids)
        return sampled

    def _key(self, step: Step, host: HostInputs, kv_lens: list[int]) -> _Key | None:
        """What would serve a step; None where none is recorded for its like."""
        count, num_seqs = host.num_decodes, len(kv_lens)
        if step.owed_logprobs or (count == num_seqs > len(step.sampling)):
            return None
        size = self._limits.size(count, len(host.token_ids) - count, num_seqs - count, max(kv_lens))
        if size is None:
            return None
        decoding: Backends = ()
        prefilling: Backends = ()
        if count:
            decoding = self._attention.serving(Phase.DECODE, Bucket(count, 1, max(kv_lens[:count])))
        if count < num_seqs:
            prompts = Bucket(num_seqs - count, int(host.q_lens.max()), max(kv_lens[count:]))
            prefilling = self._attention.serving(Phase.PREFILL, prompts)
        return _Key(size, decoding, prefilling)

    def _refuses(self, key: _Key) -> bool:
        """Whether some backend may not be recorded."""
        refused = self._attention.graphs_refused
        return bool(
            (key.decoding and refused(Phase.DECODE, key.decoding))
            or (key.prefilling and refused(Phase.PREFILL, key.prefilling))
        )

    def _record(self, key: _Key) -> _Graph:
        """The graph of a key; whatever compiles or chooses does so in a run before, of nothing but padding."""
        started, size = time.perf_counter(), key.size
        if size.decodes and not key.decoding:
            raise ValueError(f"{size.label}: nobody attends to the decodes")
        inputs = GraphInputs(size, self._static)
        sampled = self._sampled.clone()  # what the step before sampled is still wanted
        inputs.clear()
        attend = self._attention.begin_capture(
            *self._pools,
            inputs["slots"],
            dict(zip(self._phases(size), self._batches(inputs, _longest(size)))),
            {Phase.DECODE: key.decoding, Phase.PREFILL: key.prefilling},
        )
        graph, hidden = capture(
            lambda: self._compute(attend, inputs), lambda: self._compute(attend, inputs), self._memory
        )
        self._sampled.copy_(sampled)
        names = ", ".join(dict.fromkeys(backend.name for backend in key.decoding + key.prefilling))
        logger.debug("a graph of %s with %s was recorded in %.2f s", size.label, names, time.perf_counter() - started)
        return _Graph(graph, inputs, attend, hidden, self._sampled[: size.sampling])

    @staticmethod
    def _phases(size: GraphSize) -> list[Phase]:
        """Those that a size has, in the order of their tokens."""
        return [*([Phase.DECODE] if size.decodes else []), *([Phase.PREFILL] if size.prompts else [])]

    def _batches(self, inputs: GraphInputs, lens: _Lens) -> list[tuple[slice, Batch]]:
        """The tokens and sequences of each phase."""
        size, batches = inputs.size, []
        if size.decodes:
            starts = self._decode_starts[: size.decodes + 1]
            decodes = (starts, inputs["decode_lens"], inputs["decode_table"])
            batches.append((slice(0, size.decodes), self._batch([1] * size.decodes, 1, lens.decodes, *decodes)))
        if size.prompts:
            tokens = slice(size.decodes, size.decodes + size.tokens)
            prompts = (inputs["cu_q_lens"], inputs["prompt_lens"], inputs["prompt_table"])
            batches.append((tokens, self._batch(lens.q_lens, lens.max_q_len, lens.prompts, *prompts)))
        return batches

    def _batch(
        self, q_lens: list[int], max_q_len: int, kv_lens: list[int], starts: Tensor, lens: Tensor, table: Tensor
    ) -> Batch:
        return Batch(
            q_lens_cpu=q_lens,
            kv_lens_cpu=kv_lens,
            cu_q_lens=starts,
            kv_lens=lens,
            page_table=table,
            max_q_len=max_q_len,
            max_kv_len=max(kv_lens),
            num_pages=self._limits.num_pages,
        )

    def _compute(self, attend: StepAttention, inputs: GraphInputs) -> Tensor:
        """From what is in the static arrays to sampled tokens; returns the hidden states behind them."""
        sources = inputs["sources"]
        pending = self._sampled[sources.clamp(min=0)]
        token_ids = torch.where(sources >= 0, pending, inputs["token_ids"])
        hidden: Tensor = self._model(token_ids, inputs["positions"], attend)
        if inputs.size.prompts:
            hidden = hidden[inputs["sampling_rows"]]
        logits = self._model.logits(hidden)
        self._sampled[: inputs.size.sampling].copy_(self._sampler.choose_fused(logits, inputs["parameters"]))
        return hidden


def _lens(host: HostInputs, kv_lens: list[int], size: GraphSize) -> _Lens:
    """Of a step, padded."""
    count = host.num_decodes
    decodes, unused = kv_lens[:count] + [0] * (size.decodes - count), size.prompts - (len(kv_lens) - count)
    if not size.prompts:
        return _Lens(decodes, [], [], 0)
    q_lens = host.q_lens[count:].tolist() + [0] * unused
    return _Lens(decodes, kv_lens[count:] + [0] * unused, q_lens, max(q_lens))


def _longest(size: GraphSize) -> _Lens:
    """Of the largest step that a size takes: each sequence as long as can be, or one prompt of all the tokens."""
    decodes, prompts = [size.longest] * size.decodes, [size.longest] * size.prompts
    if not size.prompts:
        return _Lens(decodes, [], [], 0)
    each = size.tokens // size.prompts
    return _Lens(decodes, prompts, [size.tokens - each * (size.prompts - 1), *[each] * (size.prompts - 1)], size.tokens)
