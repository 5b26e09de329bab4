"""Steps of the real model for proof: what runs in them is what will serve."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tessera.attention.contract import Phase
from tessera.attention.prove import proof_alone, prove_in_model
from tessera.attention.step import Attention, Bucket
from tessera.runner.runner import Runner
from tessera.step import Step
from tessera.types import AttentionProof, SamplingParams, Sequence

_SIZES = {
    "cpu": {Phase.PREFILL: [Bucket(1, 48, 48), Bucket(1, 2, 2)], Phase.DECODE: [Bucket(2, 1, 100), Bucket(1, 1, 1)]},
    "cuda": {Phase.PREFILL: [Bucket(1, 512, 512), Bucket(1, 2, 2)], Phase.DECODE: [Bucket(8, 1, 512), Bucket(1, 1, 1)]},
}
"""Steps to run where all sizes are served alike: a usual one, and one that always fits."""


@dataclass(frozen=True)
class StepLimits:
    """How large a step may be."""

    max_num_seqs: int
    max_num_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int

    def fits(self, size: Bucket) -> bool:
        """Whether a step of this size can be run."""
        return (
            size.num_seqs <= self.max_num_seqs
            and size.num_seqs * size.q_len <= self.max_num_tokens
            and size.kv_len <= self.max_model_len
            and size.num_seqs * -(-size.kv_len // self.page_size) <= self.num_pages
        )


def prove_steps(
    attention: Attention, runner: Runner, limits: StepLimits, device: str
) -> dict[str, list[AttentionProof]]:
    """A proof of every backend of each phase; the pages that a step writes must belong to nobody yet.

    Raises BackendError where something else runs than a backend claims. A backend that only serves steps too
    large for this cache is proven alone, outside the model.
    """
    proofs: dict[str, list[AttentionProof]] = {}
    for phase in (Phase.PREFILL, Phase.DECODE):
        proofs[str(phase)] = []
        for of_step in attention.bound(phase):
            device_type = of_step[0].shape.device_type
            sizes = sorted(attention.buckets(phase), key=lambda size: size.num_seqs * size.kv_len)
            served = [
                size for size in [*_SIZES[device_type][phase], *sizes] if attention.serving(phase, size) == of_step
            ]
            size = next((size for size in served if limits.fits(size)), None)
            if size is None:
                proof, *_ = [proof_alone(backend, served[0], device) for backend in of_step]
            else:
                step = partial(runner.run, _make_step(size, limits.page_size))
                proof = prove_in_model(attention, phase, size, step, device)
            proofs[str(phase)].append(proof)
    return proofs


def _make_step(size: Bucket, page_size: int) -> Step:
    """A step whose sequences have computed all tokens but the last `q_len`, on pages from the first on."""
    pages_each = -(-size.kv_len // page_size)
    params = SamplingParams(temperature=0, max_tokens=1)
    sequences = [
        Sequence(
            request_id="proof",
            index=i,
            token_ids=[0] * size.kv_len,
            num_prompt_tokens=size.kv_len,
            params=params,
            seed=i,
            pages=list(range(i * pages_each, (i + 1) * pages_each)),
            num_computed_tokens=size.kv_len - size.q_len,
        )
        for i in range(size.num_seqs)
    ]
    return Step.of(dict.fromkeys(sequences, size.q_len))
