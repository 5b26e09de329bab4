"""A model with one backend in each phase, of which the logits behind every token are seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tessera.bench.offline.target import target_of
from tessera.config import EngineConfig
from tessera.runner.device import choose_device
from tessera.runner.executor import Executor
from tessera.step import Step
from tessera.types import AttentionChoice, SamplingParams, Sequence

Ids = list[list[int]]


@dataclass(frozen=True)
class Answer:
    """What a model answered to every prompt."""

    tokens: Tensor
    """[prompts, tokens] the tokens it was led along, or chose"""
    logits: list[Tensor]
    """One a token, [prompts, vocab] float32, on the CPU"""


class QualityModel:
    """Runs an executor step by step, without a scheduler; raises TesseraError where the model cannot be started."""

    def __init__(self, config: EngineConfig, num_sequences: int, longest: int) -> None:
        target = target_of(config)
        config = replace(
            config,
            model=replace(config.model, max_model_len=longest),
            scheduler=replace(config.scheduler, max_num_seqs=num_sequences),
        )
        device = choose_device(config.device.device)
        if config.device.cpu_threads is not None:
            torch.set_num_threads(config.device.cpu_threads)
        self._executor = Executor(config, target.source, target.spec, device, target.torch_dtype)
        started = self._executor.start(max_num_batched_tokens=max(2048, longest), progress=False)
        self._page_size = started.page_size
        self.attention: list[AttentionChoice] = started.attention
        self.num_four_bit_layers = started.num_four_bit_layers

    def answer(
        self, prompts: Ids, num_tokens: int, led_by: Tensor | None = None, *, decode_batch: int | None = None
    ) -> Answer:
        """Greedy tokens, or those of `led_by` [prompts, tokens], with the logits behind each.

        Prompts are computed one by one (prefill), then `decode_batch` sequences (None: all) a token at a time (decode).
        """
        sequences = list(self._sequences(prompts, num_tokens))
        rows = [self._executor.logits(Step.of({each: len(each.token_ids)}))[-1].cpu() for each in sequences]
        logits, chosen = [torch.stack(rows)], []
        for index in range(num_tokens):
            chosen.append(logits[-1].argmax(-1) if led_by is None else led_by[:, index])
            if index + 1 == num_tokens:
                break
            for sequence, token in zip(sequences, chosen[-1].tolist()):
                sequence.num_computed_tokens = len(sequence.token_ids)
                sequence.token_ids.append(token)
            size = decode_batch or len(sequences)
            groups = [sequences[start : start + size] for start in range(0, len(sequences), size)]
            rows = [self._executor.logits(Step.of(dict.fromkeys(group, 1))).cpu() for group in groups]
            logits.append(torch.cat(rows))
        return Answer(torch.stack(chosen, 1), logits)

    def negative_log_likelihoods(self, windows: Ids) -> Tensor:
        """[windows, length - 1] float64, in nats: of each token given those before it in its window."""
        found = []
        for window in windows:
            sequence = next(self._sequences([window], 0))
            logits = self._executor.logits(Step.of({sequence: len(window)}))[:-1]
            targets = torch.tensor(window[1:], device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
            found.append(loss.cpu())
        return torch.stack(found)

    def _sequences(self, prompts: Ids, num_tokens: int) -> Iterator[Sequence]:
        first_page = 0
        for index, prompt in enumerate(prompts):
            num_pages = -(-(len(prompt) + num_tokens) // self._page_size)
            pages = list(range(first_page, first_page + num_pages))
            first_page += num_pages
            yield Sequence("quality", index, list(prompt), len(prompt), SamplingParams(), index, pages)
