"""What each backend does to a model's answers, against naive in float32 on the same device."""

from __future__ import annotations

import gc
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tessera.bench.benchmark import Done
from tessera.bench.offline.target import Target, target_of
from tessera.bench.provenance import Provenance
from tessera.bench.quality.metrics import compare, perplexity
from tessera.bench.quality.model import Answer, Ids, QualityModel
from tessera.bench.quality.options import QualityOptions
from tessera.bench.quality.text import prompt_ids, read_text, windows
from tessera.bench.record import Conditions, Kind, Record, Subject, Value
from tessera.bench.subjects import Wanted
from tessera.config import DTypeName, EngineConfig
from tessera.errors import ConfigError, TesseraError
from tessera.log import logger
from tessera.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class _Reference:
    """What naive in float32 says."""

    answer: Answer
    losses: Tensor
    """[windows, tokens] nats"""


class QualityBenchmark:
    """One row for each backend in each type; the measurement has no chance in it, so there is one repeat.

    `wanted` maps a type to the backends that are compared in it. ConfigError where text or context is too short.
    """

    kind: Kind = "quality"

    def __init__(
        self,
        config: EngineConfig,
        wanted: Mapping[str, Sequence[Wanted]],
        options: QualityOptions,
        provenance: Provenance,
    ) -> None:
        self.config, self._wanted, self._options, self._provenance = config, wanted, options, provenance
        self.target: Target = target_of(config)
        encode = load_tokenizer(self.target.source, config.model).encode
        self._prompts: Ids = prompt_ids(encode, self.target.spec.vocab_size, options.prompts)
        self.text_name, text = read_text(options.text)
        self._windows: Ids = windows(encode(text), options.window, options.windows)
        self._longest = max(max(map(len, self._prompts)) + options.tokens, options.window)
        context = config.model.max_model_len or self.target.spec.max_position
        if self._longest > context:
            raise ConfigError(
                f"the measurement needs {self._longest} tokens a sequence, {self.target.name} takes {context}",
                "use a smaller --window and fewer --tokens",
            )
        self._reference: _Reference | None = None

    @property
    def num_records(self) -> int:
        """One a type and backend."""
        return sum(map(len, self._wanted.values()))

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Rows type by type; see Benchmark."""
        for dtype, backends in self._wanted.items():
            for wanted in backends:
                failed = self._row(dtype, wanted.subject, "failed", reason="not run")
                if Done(failed.case_key, wanted.label, 0) in done:
                    continue
                if wanted.reasons:
                    yield self._row(dtype, wanted.subject, "unavailable", reason="; ".join(wanted.reasons))
                else:
                    yield self._measure(dtype, wanted)

    def _measure(self, dtype: str, wanted: Wanted) -> Record:
        reference = self._reference_answers()
        logger.info("%s in %s", wanted.label, dtype)
        gc.collect()
        try:
            model = self._model(dtype, wanted.settings | {"prove_attention": True})
            batch = self._options.decode_batch
            led = model.answer(self._prompts, self._options.tokens, reference.answer.tokens, decode_batch=batch)
            free = model.answer(self._prompts, self._options.tokens, decode_batch=batch)
            losses = model.negative_log_likelihoods(self._windows)
            metrics = compare(led, free, reference.answer) | perplexity(losses, reference.losses)
            resolved = {choice.phase: choice.backends for choice in model.attention}
            proofs = [proof for choice in model.attention for proof in choice.proofs]
            subject = replace(wanted.subject, resolved=resolved, proofs=proofs)
            settings: dict[str, Value] = {"num_four_bit_layers": model.num_four_bit_layers}
            samples = _samples(losses, reference.losses)
            return self._row(dtype, subject, "ok", settings, metrics=metrics, samples=samples)
        except (TesseraError, RuntimeError) as error:
            return self._row(dtype, wanted.subject, "failed", reason=str(error).splitlines()[0])

    def _reference_answers(self) -> _Reference:
        if self._reference is None:
            logger.info("the reference: naive in float32")
            naive = {"prefill_attention": "naive", "decode_attention": "naive"}
            model = self._model("float32", naive, cpu_four_bits=None)  # which are asked of others
            answer = model.answer(self._prompts, self._options.tokens)
            self._reference = _Reference(answer, model.negative_log_likelihoods(self._windows))
        return self._reference

    def _model(self, dtype: str, attention: dict[str, Any], **device: Any) -> QualityModel:
        config = replace(
            self.config,
            model=replace(self.config.model, dtype=cast(DTypeName, dtype)),
            device=replace(self.config.device, **device) if device else self.config.device,
            attention=replace(self.config.attention, **attention),
        )
        return QualityModel(config, len(self._prompts), self._longest)

    def _row(
        self, dtype: str, subject: Subject, status: Any, settings: dict[str, Value] | None = None, **more: Any
    ) -> Record:
        options = self._options
        case: dict[str, Value] = {
            "model": self.target.name,
            "dtype": dtype,
            "prompts": options.prompts,
            "tokens": options.tokens,
            "text": self.text_name,
            "window": options.window,
            "windows": options.windows,
        }
        if options.decode_batch is not None:
            case["decode_batch"] = options.decode_batch
        always: dict[str, Value] = {"temperature": 0, "reference": "naive in float32"}
        conditions = Conditions(
            model=self.target.name,
            dtype=dtype,
            device=self.target.device,
            seed=self.config.model.seed,
            warmup="none",
            cache="off",
            settings=always | {"load_format": self.config.model.load_format} | (settings or {}),
        )
        return Record(
            kind=self.kind,
            case=case,
            subject=subject,
            status=status,
            conditions=conditions,
            provenance=self._provenance,
            **more,
        )


def _samples(losses: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """The loss of every token in nats, a list a window, and the reference's mean of each window."""
    found = {f"nll_window_{n}": [round(loss, 6) for loss in row] for n, row in enumerate(losses.tolist())}
    return found | {"nll_reference_windows": torch.mean(reference, 1).tolist()}
