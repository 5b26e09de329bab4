"""Sampling: from logits to one token a sequence.

A row's result depends on that row alone: its logits, its parameters, its seed and how many tokens it
has, never on what else is in the batch, on preemption or on the order of steps. So the random number
is a hash of (seed, position), not the state of a generator, and the token is found by inverting the
cumulative distribution over the vocabulary in its own order. On CUDA four kernels do this for all rows
(`kernels.sampling`), without sorting; its tokens are those of the path below but where rounding tips a
draw that falls on the border of two tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from tessera.kernels.fused import fused_on
from tessera.runner.parameters import is_adjusted, parameters, uniform
from tessera.runner.transfer import HostCopy, Returns, to_device
from tessera.types import Sequence, TokenLogprobs

_TOP_P_SHORTLIST = 1024
"""Most likely tokens that are looked at before the whole vocabulary is sorted for top-p."""


class Sampler:
    """Samples the next token of each sequence; `eos_token_ids` are held back until `min_tokens`.

    device  where logits come from; None: a CPU
    fused   whether the kernel chooses tokens; None: wherever it runs
    """

    def __init__(
        self, eos_token_ids: Items[int], device: torch.device | None = None, *, fused: bool | None = None
    ) -> None:
        self._eos_token_ids = list(eos_token_ids)
        self.fused = (device is not None and fused_on(device)) if fused is None else fused
        if self.fused:
            from tessera.kernels.sampling import sample

            self._sample_fused = sample

    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> Sampled:
        """Sample one token a row, and measure logprobs for the sequences that asked for them.

        logits  [sequences, vocab] float32; overwritten
        """
        wanting = [(row, s) for row, s in enumerate(sequences) if s.params.logprobs is not None]
        logprobs = logits[[row for row, _ in wanting]].log_softmax(-1) if wanting else None
        for row, sequence in enumerate(sequences):
            if is_adjusted(sequence):
                self._adjust(logits[row], sequence)
        token_ids = self._choose(logits, sequences)
        if logprobs is None:
            return Sampled(token_ids, sequences)
        chosen = token_ids[[row for row, _ in wanting]] if len(wanting) < len(sequences) else token_ids
        tops = {row: sequence.params.logprobs or 0 for row, sequence in wanting}
        return Sampled(token_ids, sequences, tops, measure_logprobs(logprobs, chosen, max(tops.values())))

    def _adjust(self, row: Tensor, sequence: Sequence) -> None:
        """Apply bias, penalties and `min_tokens` to one row of logits, in place."""
        params = sequence.params
        if params.has_penalties:
            _penalise(row, sequence)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row.index_add_(0, ids, torch.tensor(list(params.logit_bias.values()), device=row.device, dtype=row.dtype))
        if sequence.num_output_tokens < params.min_tokens:
            held_back = params.stop_token_ids + ([] if params.ignore_eos else self._eos_token_ids)
            row[held_back] = -torch.inf

    def _choose(self, logits: Tensor, sequences: Items[Sequence]) -> Tensor:
        """[sequences] int64 token ids"""
        if self.fused:
            (table,) = to_device([parameters(sequences)], logits.device)
            return self.choose_fused(logits, table)
        random = [row for row, s in enumerate(sequences) if not s.params.greedy]
        chosen = logits.argmax(-1)
        if random:
            rows = random if len(random) < len(sequences) else slice(None)
            chosen[rows] = _sample_random(logits[rows], [sequences[row] for row in random])
        return chosen

    def choose_fused(self, logits: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows] int64 token ids, by the kernel; logits are left as they are. For a `fused` sampler only.

        table  [rows, 5] float64: see `parameters`
        out    [rows] int64, to be written; None: a new one
        """
        return self._sample_fused(logits, table, out=out)


class Sampled:
    """What was sampled, on the device, and on its way to the host.

    token_ids  [sequences or more] int64
    tops       of each row that wants logprobs, how many of the most likely tokens
    returns    where token ids come back, if they alone are wanted; None: memory of their own
    """

    def __init__(
        self,
        token_ids: Tensor,
        sequences: Items[Sequence],
        tops: dict[int, int] | None = None,
        logprobs: tuple[Tensor, ...] = (),
        returns: Returns | None = None,
    ) -> None:
        self.token_ids = token_ids
        self._sequences, self._tops = sequences, tops or {}
        self._copy = HostCopy([token_ids, *logprobs]) if returns is None else returns.copy(token_ids)

    def result(self) -> tuple[list[int], dict[Sequence, TokenLogprobs]]:
        """The token ids, and logprobs of the sequences that asked for them; waits for the device."""
        if not isinstance(self._copy, HostCopy):
            return self._copy.wait()[: len(self._sequences)], {}
        tensor, *logprobs = self._copy.wait()
        token_ids: list[int] = tensor.tolist()
        entries = logprob_entries([token_ids[row] for row in self._tops], logprobs, list(self._tops.values()))
        return token_ids, {self._sequences[row]: entry for row, entry in zip(self._tops, entries)}


def measure_logprobs(logprobs: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row, on the device: its token's log-probability and rank, and the most likely ones, and their ids.

    logprobs   [rows, vocab]
    token_ids  [rows] int64
    """
    own = logprobs.gather(1, token_ids[:, None])
    values, ids = logprobs.topk(max(1, num_top))
    return own[:, 0], (logprobs > own).sum(-1) + 1, values, ids


def logprob_entries(token_ids: Items[int], measured: Items[Tensor], tops: Items[int]) -> list[TokenLogprobs]:
    """One entry a row of what `measure_logprobs` found, on the host, with as many of the most likely as `tops` says."""
    if not token_ids:
        return []
    return [
        TokenLogprobs(token_id, logprob, rank, list(zip(top_ids[:top], values[:top])))
        for token_id, top, logprob, rank, values, top_ids in zip(
            token_ids, tops, *(tensor.tolist() for tensor in measured)
        )
    ]


def _penalise(row: Tensor, sequence: Sequence) -> None:
    params, vocab_size = sequence.params, row.shape[0]
    tokens = torch.tensor(sequence.token_ids, device=row.device)
    if params.repetition_penalty != 1:
        seen = torch.unique(tokens)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if sequence.num_output_tokens and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(tokens[sequence.num_prompt_tokens :], minlength=vocab_size)
        row -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)


def _sample_random(logits: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Token ids [rows] int64 of rows with a temperature; logits [rows, vocab] float32."""
    params, device = [s.params for s in sequences], logits.device
    temperatures = torch.tensor([p.temperature for p in params], device=device, dtype=logits.dtype)
    # Before dividing, or a low temperature would overflow: the softmax is the same.
    shifted = logits - logits.amax(-1, keepdim=True)
    probs = (shifted / temperatures[:, None]).softmax(-1)
    if any(p.min_p > 0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device, dtype=probs.dtype)
        probs = probs * (probs >= floor[:, None] * probs.amax(-1, keepdim=True))
    truncated = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    for row in truncated:
        probs[row] *= probs[row] >= _truncation_floor(probs[row], params[row].top_k, params[row].top_p)
    seeds, positions = np.array([(s.seed, s.num_output_tokens) for s in sequences], np.uint64).T
    # float64, or the tail of a large vocabulary would be lost in rounding.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    targets = torch.from_numpy(uniform(seeds, positions)).to(device)[:, None] * cumulative[:, -1:]
    # The first entry above the target: a token of probability 0 adds nothing and is never it.
    # Clamped, because NaN logits of a model that overflowed must not end the engine for everybody else.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)


def _truncation_floor(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """The least probability that top-k, and then top-p over what top-k leaves, keep; probs [vocab]."""
    vocab_size = probs.shape[0]
    width = min(top_k or _TOP_P_SHORTLIST, vocab_size)
    top = probs.topk(width).values
    if top_p == 1:
        return top[-1]
    total = top.sum() if top_k else probs.sum()
    if not top_k and top.sum() < top_p * total:
        top = probs.sort(descending=True).values
    before = top.cumsum(0) - top  # mass of the tokens ahead of each
    kept = (before < top_p * total).sum().clamp_(min=1)
    return top[kept - 1]
