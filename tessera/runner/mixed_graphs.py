"""Steps with prompts in them as CUDA graphs, for prompts so short that launching takes longer than computing.

Recorded once for each size that `mixed_inputs` pads a step to, replayed with other numbers in place, sampling included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.attention.contract import AttentionBackend, Batch, Phase
from tessera.attention.cuda import capture
from tessera.attention.step import Attention, Bucket, StepAttention
from tessera.log import logger
from tessera.model.language_model import LanguageModel
from tessera.runner.graphs import PADDING_SLOT
from tessera.runner.inputs import HostInputs, LastSampled
from tessera.runner.mixed_inputs import MixedInputs, MixedLimits, MixedSize, padded
from tessera.runner.parameters import SamplingRows
from tessera.runner.sampler import Sampled, Sampler
from tessera.runner.transfer import HostCopy
from tessera.step import Step

Backends = tuple[AttentionBackend[Any], ...]


@dataclass(frozen=True)
class _Graph:
    """One recorded step."""

    graph: torch.cuda.CUDAGraph
    inputs: MixedInputs
    attend: StepAttention
    hidden: Tensor
    """[rows that may be sampled, hidden_size], of the last replay."""


class MixedGraphs:
    """Replays steps with prompts in them; records a graph the first time that its size is needed.

    pools    as in Runner: keys and values of every layer
    sampler  a fused one, for sampling is part of the graph
    """

    def __init__(
        self,
        model: LanguageModel,
        attention: Attention,
        pools: tuple[Items[Tensor], Items[Tensor]],
        sampler: Sampler,
        limits: MixedLimits,
    ) -> None:
        self._model, self._attention, self._pools, self._sampler = model, attention, pools, sampler
        self._limits = limits
        graphs, device = limits.graphs, pools[0][0].device
        most = graphs.max_num_seqs
        self._storage = torch.zeros(limits.num_bytes, dtype=torch.uint8, device=device)
        self._sampled = torch.zeros(2 * most, dtype=torch.int64, device=device)
        self._decode_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._graphs: dict[tuple[MixedSize, Backends, Backends], _Graph] = {}
        self._memory: Any = torch.cuda.graph_pool_handle()
        self._sampling = SamplingRows.of([])

    def serves(self, step: Step, host: HostInputs) -> bool:
        """Whether a step has prompts, is small enough, and attended to by backends that a graph may record."""
        if self._size(host) is None or step.owed_logprobs:
            return False
        decoding, prefilling = self._serving(host)
        refused = self._attention.graphs_refused(Phase.PREFILL, prefilling)
        return not (refused or self._attention.graphs_refused(Phase.DECODE, decoding))

    def begin(self, step: Step, host: HostInputs, last: LastSampled | None) -> Sampled | HostCopy:
        """Replay the graph of a step that it `serves`; what is sampled stands in the same memory step after step.

        returns  where nothing is sampled, anything that is copied when the step is done
        """
        size = self._size(host)
        assert size is not None, "only steps that are served are begun"
        graph = self._graph(size, *self._serving(host))
        if last is not None and last.token_ids.data_ptr() != self._sampled.data_ptr():
            self._sampled[: len(last.token_ids)].copy_(last.token_ids)
        num_tokens = step.kv_lens[step.samples]
        self._sampling = self._sampling.following(step.sampling)
        parameters = self._sampling.parameters(num_tokens)
        graph.inputs.write(padded(host, size, parameters, self._limits.graphs.page_size))
        graph.attend.update(*(batch for _, batch in self._batches(graph.inputs, host).values()))
        graph.graph.replay()
        count = len(step.sampling)
        if not count:
            return HostCopy([graph.hidden[:1, :1]])
        if self._sampling.all_plain(num_tokens):
            return Sampled(self._sampled[:count], step.sampling)
        logits = self._model.logits(graph.hidden[:count])  # a second time, for those who ask more than the token
        sampled = self._sampler.sample(logits, step.sampling)
        self._sampled[:count].copy_(sampled.token_ids)
        return sampled

    def _size(self, host: HostInputs) -> MixedSize | None:
        decodes = int((host.q_lens == 1).sum())
        tokens, prompts = len(host.token_ids) - decodes, len(host.q_lens) - decodes
        return self._limits.size(decodes, tokens, prompts, int(host.kv_lens.max())) if prompts else None

    def _serving(self, host: HostInputs) -> tuple[Backends, Backends]:
        """What attends to the decodes, () where there are none, and to the prompts."""
        count = int((host.q_lens == 1).sum())
        prompts = Bucket(len(host.q_lens) - count, int(host.q_lens.max()), int(host.kv_lens[count:].max()))
        prefilling = self._attention.serving(Phase.PREFILL, prompts)
        if not count:
            return (), prefilling
        return self._attention.serving(Phase.DECODE, Bucket(count, 1, int(host.kv_lens[:count].max()))), prefilling

    def _graph(self, size: MixedSize, decoding: Backends, prefilling: Backends) -> _Graph:
        """The graph of a size of step, attended to by these."""
        if not decoding and size.decodes:
            raise ValueError(f"{size.label}: nobody attends to the decodes")
        found = self._graphs.get((size, decoding, prefilling))
        if found is None:
            started = time.perf_counter()
            found = self._graphs[size, decoding, prefilling] = self._capture(size, decoding, prefilling)
            logger.debug("a graph of %s was recorded in %.2f s", size.label, time.perf_counter() - started)
        return found

    def _capture(self, size: MixedSize, decoding: Backends, prefilling: Backends) -> _Graph:
        """Record a step; whatever compiles or chooses does so in a run before, of nothing but padding."""
        inputs = MixedInputs(size, self._limits.graphs.page_size, self._storage)
        sampled = self._sampled.clone()  # what the step before sampled is still wanted
        self._storage.zero_()
        inputs["sources"].fill_(-1)
        inputs["slots"].fill_(PADDING_SLOT)
        attend = self._attention.begin_capture(
            *self._pools,
            inputs["slots"],
            self._batches(inputs, None),
            {Phase.DECODE: decoding, Phase.PREFILL: prefilling},
        )
        graph, hidden = capture(
            lambda: self._compute(attend, inputs), lambda: self._compute(attend, inputs), self._memory
        )
        self._sampled.copy_(sampled)
        return _Graph(graph, inputs, attend, hidden)

    def _batches(self, inputs: MixedInputs, host: HostInputs | None) -> dict[Phase, tuple[slice, Batch]]:
        """The tokens and sequences of each phase; of the largest step there can be where there is no `host`."""
        size, longest = inputs.size, inputs.size.longest
        decode_lens, prompt_lens = [longest] * size.decodes, [longest] * size.prompts
        each = size.tokens // size.prompts
        q_lens = [size.tokens - each * (size.prompts - 1), *[each] * (size.prompts - 1)]
        if host is not None:
            count = int((host.q_lens == 1).sum())
            unused = size.prompts - (len(host.q_lens) - count)
            decode_lens = host.kv_lens[:count].tolist() + [0] * (size.decodes - count)
            prompt_lens, q_lens = (
                host.kv_lens[count:].tolist() + [0] * unused,
                host.q_lens[count:].tolist() + [0] * unused,
            )
        batches: dict[Phase, tuple[slice, Batch]] = {}
        if size.decodes:
            of_decodes = (self._decode_starts[: size.decodes + 1], inputs["decode_lens"], inputs["decode_table"])
            batches[Phase.DECODE] = slice(0, size.decodes), self._batch([1] * size.decodes, 1, decode_lens, *of_decodes)
        of_prompts = (inputs["cu_q_lens"], inputs["prompt_lens"], inputs["prompt_table"])
        tokens = slice(size.decodes, size.decodes + size.tokens)
        max_q_len = size.tokens if host is None else max(q_lens)  # one prompt may have all the tokens
        batches[Phase.PREFILL] = tokens, self._batch(q_lens, max_q_len, prompt_lens, *of_prompts)
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
            num_pages=self._limits.graphs.num_pages,
        )

    def _compute(self, attend: StepAttention, inputs: MixedInputs) -> Tensor:
        """From what is in the static arrays to sampled tokens; returns the hidden states behind them."""
        sources, rows = inputs["sources"], inputs["sampling_rows"]
        pending = self._sampled[sources.clamp(min=0)]
        token_ids = torch.where(sources >= 0, pending, inputs["token_ids"])
        hidden: Tensor = self._model(token_ids, inputs["positions"], attend)[rows]
        logits = self._model.logits(hidden)
        self._sampled[: len(rows)].copy_(self._sampler.choose_fused(logits, inputs["parameters"]))
        return hidden
