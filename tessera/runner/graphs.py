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
from tessera.attention.cuda import capture, graph_pool, is_out_of_memory
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


@dataclass(frozen=True, slots=True)
class _Graph:
    """One recorded step."""

    graph: torch.cuda.CUDAGraph
    inputs: GraphInputs
    attend: StepAttention
    batches: list[Batch]
    """What it was recorded with: one a phase, in the order of their tokens."""
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
        self._is_full = False
        """Whether memory was too little for one graph: no other is recorded then."""
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
            graph = None if self._refuses(key) else self._record_if_room(key)
            if graph is None:
                return None
            self._graphs[key] = graph
        if last is not None and last.token_ids.data_ptr() != self._sampled.data_ptr():
            self._sampled[: len(last.token_ids)].copy_(last.token_ids)
        count = len(step.sampling)
        num_tokens = step.kv_lens if count == len(kv_lens) else step.kv_lens[step.samples]
        self._sampling = self._sampling.following(step.sampling)
        graph.inputs.write(host, self._sampling, num_tokens)
        graph.attend.update(*_batches_now(graph.batches, key.size, host, kv_lens))
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

    def _record_if_room(self, key: _Key) -> _Graph | None:
        """The graph of a key; None where the device's memory is full: the step is launched, and those like it."""
        if self._is_full:
            return None
        try:
            sampled = self._sampled.clone()  # what the step before sampled is still wanted
            try:
                return self._record(key)
            finally:
                self._sampled.copy_(sampled)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._is_full = True
            logger.warning(
                "no memory is left to record a step of %s as a CUDA graph: it is launched, which is slower, and so are "
                "others that were not recorded yet; hint: use a smaller --gpu-memory-utilization",
                key.size.label,
            )
            return None

    def _record(self, key: _Key) -> _Graph:
        """The graph of a key; whatever compiles or chooses does so in a run before, of nothing but padding."""
        started, size = time.perf_counter(), key.size
        if size.decodes and not key.decoding:
            raise ValueError(f"{size.label}: nobody attends to the decodes")
        inputs = GraphInputs(size, self._static)
        inputs.clear()
        batches = self._longest_batches(inputs)
        backends = {Phase.DECODE: key.decoding, Phase.PREFILL: key.prefilling}
        attend = self._attention.begin_capture(*self._pools, inputs["slots"], batches, backends)
        graph, hidden = capture(
            lambda: self._compute(attend, inputs), lambda: self._compute(attend, inputs), self._memory
        )
        names = ", ".join(dict.fromkeys(backend.name for backend in key.decoding + key.prefilling))
        logger.debug("a graph of %s with %s was recorded in %.2f s", size.label, names, time.perf_counter() - started)
        recorded = [batch for _, batch in batches.values()]
        return _Graph(graph, inputs, attend, recorded, hidden, self._sampled[: size.sampling])

    def _longest_batches(self, inputs: GraphInputs) -> dict[Phase, tuple[slice, Batch]]:
        """Tokens and sequences of each phase in the largest step that a size takes; one prompt may have all tokens."""
        size, longest = inputs.size, inputs.size.longest
        batches: dict[Phase, tuple[slice, Batch]] = {}
        if size.decodes:
            tensors = (self._decode_starts[: size.decodes + 1], inputs["decode_lens"], inputs["decode_table"])
            ones, lens = [1] * size.decodes, [longest] * size.decodes
            decodes = Batch(ones, lens, *tensors, 1, longest, self._limits.num_pages)
            batches[Phase.DECODE] = slice(0, size.decodes), decodes
        if size.prompts:
            tensors = (inputs["cu_q_lens"], inputs["prompt_lens"], inputs["prompt_table"])
            each, lens = size.tokens // size.prompts, [longest] * size.prompts
            q_lens = [size.tokens - each * (size.prompts - 1), *[each] * (size.prompts - 1)]
            prompts = Batch(q_lens, lens, *tensors, size.tokens, longest, self._limits.num_pages)
            batches[Phase.PREFILL] = slice(size.decodes, size.decodes + size.tokens), prompts
        return batches

    def _compute(self, attend: StepAttention, inputs: GraphInputs) -> Tensor:
        """From what is in the static arrays to sampled tokens; returns the hidden states behind them."""
        token_ids = _known(inputs["token_ids"], inputs["sources"], self._sampled)
        hidden: Tensor = self._model(token_ids, inputs["positions"], attend)
        if inputs.size.prompts:
            hidden = hidden[inputs["sampling_rows"]]
        logits = self._model.logits(hidden)
        self._sampler.choose_fused(logits, inputs["parameters"], self._sampled[: inputs.size.sampling])
        return hidden


def _known(token_ids: Tensor, sources: Tensor, sampled: Tensor) -> Tensor:
    """[tokens] int64: see `kernels.step_begin.pending_tokens`, which serves on CUDA."""
    if token_ids.is_cuda:
        from tessera.kernels.step_begin import pending_tokens

        return pending_tokens(token_ids, sources, sampled)
    return torch.where(sources >= 0, sampled[sources.clamp(min=0)], token_ids)


def _batches_now(recorded: Items[Batch], size: GraphSize, host: HostInputs, kv_lens: list[int]) -> list[Batch]:
    """The batches of a step that is padded to a size: other lengths, the same tensors."""
    count, batches = host.num_decodes, []
    if size.decodes:
        padded = kv_lens[:count] + [0] * (size.decodes - count)
        batches.append(_with_lens(recorded[0], recorded[0].q_lens_cpu, 1, padded))
    if size.prompts:
        unused = [0] * (size.prompts - (len(kv_lens) - count))
        q_lens = host.q_lens[count:].tolist() + unused
        batches.append(_with_lens(recorded[-1], q_lens, max(q_lens), kv_lens[count:] + unused))
    return batches


def _with_lens(batch: Batch, q_lens: list[int], max_q_len: int, kv_lens: list[int]) -> Batch:
    tensors = batch.cu_q_lens, batch.kv_lens, batch.page_table
    return Batch(q_lens, kv_lens, *tensors, max_q_len, max(kv_lens), batch.num_pages)
