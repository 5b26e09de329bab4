"""Where a model's scores lie, for decoding that has to know: measured at start on what the model itself says."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from tessera.attention.calibrate import Calibration, UnifiedMax
from tessera.attention.contract import Batch, Phase
from tessera.attention.step import Attention
from tessera.model.language_model import LanguageModel
from tessera.runner.prove import StepLimits
from tessera.runner.runner import Runner
from tessera.step import Step
from tessera.types import SamplingParams, Sequence

NUM_SEQUENCES = 4
NUM_TOKENS = 64
"""Of each sequence."""


def calibrate(
    model: LanguageModel,
    attention: Attention,
    pools: tuple[Items[Tensor], Items[Tensor]],
    limits: StepLimits,
    device: torch.device,
) -> UnifiedMax | None:
    """Tell every DECODE backend that has a `unified_max` where it is to lie; None where none has one.

    pools  keys and values of every layer; the pages that are written must belong to nobody yet

    Sequences of random beginnings are continued by sampling, then computed once more as prompts while the scores of
    every layer are counted.
    """
    asking = [each for bound in attention.bound(Phase.DECODE) for each in bound if hasattr(each, "unified_max")]
    if not asking:
        return None
    spoken = _speak(Runner(model, attention, *pools, device), limits, model.spec.vocab_size)
    shapes = attention.layer_shapes(Phase.PREFILL)
    calibration = Calibration(shapes)

    def observe(layer: int, q: Tensor, pages: Tensor, batch: Batch) -> None:
        calibration.observe(layer, q, _keys(pages, batch), batch.kv_lens_cpu)

    watching = attention.watched(observe)
    Runner(model, watching, *pools, device).run(_as_prompts(spoken, limits.page_size))
    found = calibration.find(shapes[0].dtype)
    for backend in asking:
        backend.unified_max = found.phi
    return found


def _keys(pages: Tensor, batch: Batch) -> Tensor:
    """[tokens, kv_heads, head_dim]: the keys of a batch's sequences, one after another."""
    page_size = pages.shape[1]
    return torch.cat(
        [
            pages[row[: -(-length // page_size)].long()].flatten(0, 1)[:length]
            for row, length in zip(batch.page_table, batch.kv_lens_cpu)
        ]
    )


def _speak(runner: Runner, limits: StepLimits, vocab_size: int) -> list[Sequence]:
    """Sequences of what the model says after one random token each, as long as there is room."""
    length = min(NUM_TOKENS, limits.max_model_len - 1, limits.num_pages * limits.page_size)
    pages_each = -(-length // limits.page_size)
    number = max(1, min(NUM_SEQUENCES, limits.max_num_seqs, limits.num_pages // pages_each))
    number = max(1, min(number, limits.max_num_tokens // length))
    first = torch.randint(vocab_size, (number,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = [_sequence(index, [token], pages_each) for index, token in enumerate(first)]
    for _ in range(length - 1):
        said = runner.run(Step.of(dict.fromkeys(sequences, 1))).token_ids
        for sequence, token in zip(sequences, said):
            sequence.num_computed_tokens += 1
            sequence.token_ids.append(token)
    return sequences


def _as_prompts(spoken: Items[Sequence], page_size: int) -> Step:
    """The same tokens, none of them computed."""
    fresh = [_sequence(each.index, each.token_ids, -(-len(each.token_ids) // page_size)) for each in spoken]
    return Step.of({each: len(each.token_ids) for each in fresh})


def _sequence(index: int, token_ids: list[int], num_pages: int) -> Sequence:
    pages = list(range(index * num_pages, (index + 1) * num_pages))
    params = SamplingParams(temperature=1.0, max_tokens=NUM_TOKENS)
    return Sequence("calibration", index, list(token_ids), len(token_ids), params, index, pages)
