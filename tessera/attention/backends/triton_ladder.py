"""triton:two_pass, triton:fa1, triton:fa2: what prefill was before `triton`, one idea at a time.

Each serves what `triton` serves, so that `tessera bench kernels --ladder` can say what an idea is worth on a GPU and a
model's heads. They share tile sizes with FlashAttention-2, those that are shipped: what differs is the idea.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from tessera.attention.backends.triton import KERNELS, Triton
from tessera.attention.backends.triton_backend import TritonBackend, claim_of
from tessera.attention.backends.triton_choice import gpu_name, shipped
from tessera.attention.backends.triton_options import device_resources
from tessera.attention.contract import Batch, Claim, Limits, Phase, Shape
from tessera.kernels.scores import Scores

if TYPE_CHECKING:
    from tessera.kernels.fa1 import State

_LIMITS = {phase: replace(Triton.limits[phase], graphs=False) for phase in (Phase.PREFILL, Phase.VISION)}
"""No graph records them: a grid follows the longest prompt, or a state the tokens, of the step that it is made for."""


@dataclass(frozen=True)
class RungPlan:
    """What `run` needs to know about a step."""

    batch: Batch
    state: State | None = None
    """Of FlashAttention-1."""


class _PrefillRung(TritonBackend[RungPlan]):
    """A kernel of the time before FlashAttention-2."""

    limits: ClassVar[dict[Phase, Limits]] = _LIMITS
    kernel: ClassVar[str]
    """As a profiler sees it."""

    @classmethod
    def kernel_of(cls, phase: Phase) -> str:
        """Its one kernel, the same in every phase."""
        return cls.kernel

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        _, shared_memory = device_resources(shape)
        self._options = shipped(phase, shape, shared_memory, gpu_name(shape)).few.arguments()
        self._scores = Scores(shape.scale, shape.window, shape.soft_cap)

    def plan(self, batch: Batch) -> RungPlan:
        """The batch as it is: programs find their tiles themselves."""
        return RungPlan(batch)


class TritonTwoPass(_PrefillRung):
    """Scores stay on the chip; the softmax is known before a value is read."""

    name: ClassVar[str] = "triton:two_pass"
    rung: ClassVar[str | None] = "naive fused: scores stay on the chip, keys are read twice"
    kernel: ClassVar[str] = "two_pass_kernel"

    def _launch(self, plan: RungPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        from tessera.kernels.two_pass import two_pass

        batch = plan.batch
        where = (batch.cu_q_lens, batch.kv_lens, batch.page_table, batch.max_q_len)
        return two_pass(q, k, v, sinks, *where, self.shape.causal, self._scores, self._options)


class TritonFa1(_PrefillRung):
    """FlashAttention, arXiv 2205.14135: the softmax in one pass, one program a sequence and head."""

    name: ClassVar[str] = "triton:fa1"
    rung: ClassVar[str | None] = "FlashAttention: online softmax, one program a head, keys in the outer loop"
    kernel: ClassVar[str] = "fa1_kernel"

    def __init__(self, phase: Phase, shape: Shape) -> None:
        super().__init__(phase, shape)
        # Triton would fetch ahead what a tile has gathered so far, float32, which no block has the memory for.
        self._options |= {"NUM_STAGES": 1}

    def plan(self, batch: Batch) -> RungPlan:
        """Allocate what queries gather in, which all layers share."""
        from tessera.kernels.fa1 import State

        shape = self.shape
        tokens = sum(batch.q_lens_cpu)
        return RungPlan(batch, State.allocate(tokens, shape.num_q_heads, shape.head_dim, batch.cu_q_lens.device))

    def _launch(self, plan: RungPlan, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        from tessera.kernels.fa1 import fa1

        batch = plan.batch
        assert plan.state is not None
        where = (batch.cu_q_lens, batch.kv_lens, batch.page_table, plan.state)
        return fa1(q, k, v, sinks, *where, self.shape.causal, self._scores, self._options)


class TritonFa2(Triton):
    """FlashAttention-2, arXiv 2307.08691: `triton`'s own kernel, on a Hopper GPU too where `triton` has a newer one."""

    name: ClassVar[str] = "triton:fa2"
    rung: ClassVar[str | None] = "FlashAttention-2: a program a tile of queries, answers in registers, GQA packed"
    limits: ClassVar[dict[Phase, Limits]] = _LIMITS

    @classmethod
    def claim(cls, phase: Phase, shape: Shape) -> Claim:
        """The kernel of the phase that every GPU can run."""
        return claim_of(KERNELS[phase], shape)

    def __init__(self, phase: Phase, shape: Shape) -> None:
        _, shared_memory = device_resources(shape)
        super().__init__(phase, shape, shipped(phase, shape, shared_memory, gpu_name(shape)), hopper=False)
