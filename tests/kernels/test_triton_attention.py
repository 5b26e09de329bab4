"""Triton attention against the oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fake_graph import capture_fake
from tessera.attention.backends.triton import KERNELS, Triton
from tessera.attention.backends.triton_choice import shipped
from tessera.attention.backends.triton_options import LEAST_SHARED_MEMORY, Options
from tessera.attention.backends.triton_tables import FALLBACK, KNOWN
from tessera.attention.checks import Subject
from tessera.attention.checks_cuda import graph_replay, replay_problems
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import TOLERANCE, WORKLOADS, Case, Workload, make_batch, make_case
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    every_dtype,
    needs_compiler,
    needs_cuda,
    needs_kernels,
    outside_interpreter,
)

HEAD_DIMS = [32, 64, 72, 80, 96, 112, 128, 160, 256]
MIXED = {
    Phase.DECODE: Workload(((1, 70), (1, 3), (1, 129))),
    Phase.PREFILL: Workload(((19, 19), (7, 40))),
    Phase.VISION: Workload(((19, 19), (40, 40))),
}
FEATURES = {
    Phase.DECODE: (Workload(((1, 70), (1, 600)), window=300, soft_cap=5.0, sinks=True),),
    Phase.PREFILL: (
        Workload(((70, 90), (3, 70)), window=20, soft_cap=5.0, sinks=True),
        Workload(((70, 90), (3, 70)), window=20, causal=False),
        Workload(((5, 90), (70, 70)), sinks=True, causal=False),
    ),
    Phase.VISION: (Workload(((90, 90), (3, 3)), window=20, soft_cap=5.0, sinks=True),),
}
"""Features together, which the named workloads ask for one at a time."""

every_phase = pytest.mark.parametrize("phase", list(Phase))


def make_shape(
    q_heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> Shape:
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else (0, 0)
    return Shape(q_heads, kv_heads, head_dim, head_dim**-0.5, dtype, device, capability, page_size)


def check(phase: Phase, workload: Workload, shape: Shape) -> None:
    case = make_case(phase, workload, shape)
    assert Triton.reasons_against(phase, case.shape) == []
    assert case.problems(case.answer(Triton)) == []


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize(("phase", "name"), [(phase, name) for phase in Phase for name in WORKLOADS[phase]])
def test_workload_equals_the_oracle(dtype: torch.dtype, phase: Phase, name: str) -> None:
    # In the interpreter a wide head is as quick as a narrow one, and only 128 takes the tiles made for most models.
    check(phase, WORKLOADS[phase][name], make_shape(head_dim=128 if dtype == torch.float16 else 32, dtype=dtype))


@needs_kernels
@every_dtype
@every_phase
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dim_equals_the_oracle(dtype: torch.dtype, phase: Phase, head_dim: int) -> None:
    check(phase, MIXED[phase], make_shape(head_dim=head_dim, dtype=dtype))


@needs_kernels
@every_phase
def test_a_sink_of_no_weight_is_none(phase: Phase) -> None:
    """Even for queries that see nothing of the first tile of keys that their tile goes through."""
    lens = {Phase.DECODE: ((1, 600), (1, 3)), Phase.PREFILL: ((70, 90), (3, 70)), Phase.VISION: ((90, 90), (3, 3))}
    case = make_case(phase, Workload(lens[phase], window=5, sinks=True), make_shape(2, 2))
    assert case.sinks is not None
    case.sinks.fill_(-torch.inf)
    assert case.problems(case.answer(Triton)) == []


@needs_kernels
@every_phase
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_group_equals_the_oracle(phase: Phase, group: int) -> None:
    check(phase, MIXED[phase], make_shape(2 * group, 2, dtype=torch.float16))
    check(phase, MIXED[phase], make_shape(group, 1))


@needs_kernels
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
@pytest.mark.parametrize("page_size", [1, 16, 24, 32, 64, 128, 256])
def test_page_size_equals_the_oracle(phase: Phase, page_size: int) -> None:
    check(phase, MIXED[phase], make_shape(page_size=page_size, dtype=torch.float16))


@needs_kernels
@every_dtype
@pytest.mark.parametrize(("phase", "workload"), [(phase, one) for phase in Phase for one in FEATURES[phase]])
def test_features_work_together(dtype: torch.dtype, phase: Phase, workload: Workload) -> None:
    check(phase, workload, make_shape(dtype=dtype))


def strided(x: Tensor) -> Tensor:
    """The same values, as the middle of a wider tensor."""
    wide = torch.full((x.shape[0], x.shape[1] + 3, x.shape[2]), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 1:-2] = x
    return wide[:, 1:-2]


@needs_kernels
@every_phase
def test_strided_inputs_give_the_same_bits(phase: Phase) -> None:
    case = make_case(phase, MIXED[phase], make_shape(dtype=torch.float16))
    k, v = (strided(x) if phase is Phase.VISION else x for x in (case.k, case.v))
    assert torch.equal(replace(case, q=strided(case.q), k=k, v=v).answer(Triton), case.answer(Triton))


@needs_kernels
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DECODE])
def test_slots_past_a_sequences_end_are_never_read(phase: Phase) -> None:
    case = make_case(phase, MIXED[phase], make_shape(dtype=torch.float16))
    pools = []
    for pool in (case.k, case.v):
        poisoned = torch.full_like(pool, torch.nan)
        for row, kv_len in zip(case.batch.page_table.tolist(), case.batch.kv_lens_cpu):
            for position in range(kv_len):
                at = row[position // 16], position % 16
                poisoned[at] = pool[at]
        pools.append(poisoned)
    assert case.problems(replace(case, k=pools[0], v=pools[1]).answer(Triton)) == []


@needs_kernels
def test_padding_rows_of_garbage_come_back_as_zeros() -> None:
    for sinks in (False, True):
        case = make_case(Phase.DECODE, replace(WORKLOADS[Phase.DECODE]["padding_rows"], sinks=sinks), make_shape())
        case.q[2:] = torch.nan
        answer = case.answer(Triton)
        assert not answer[2:].any()
        assert case.problems(answer) == []
        alone = make_case(Phase.DECODE, Workload(((1, 0),) * 3, sinks=sinks), make_shape())
        assert not alone.answer(Triton).any()


@needs_kernels
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.VISION])
def test_a_sequence_has_the_same_bits_in_any_batch(phase: Phase) -> None:
    assert Triton.limits[phase].batch_invariant
    case = make_case(phase, MIXED[phase], make_shape(dtype=torch.float16))
    both, (q_len, kv_len) = case.answer(Triton), MIXED[phase].lens[0]
    k, v = (x[:q_len] if phase is Phase.VISION else x for x in (case.k, case.v))
    batch = make_batch(((q_len, kv_len),), case.batch.page_table[:1].cpu(), case.batch.num_pages, DEVICE)
    alone = replace(case, q=case.q[:q_len], k=k, v=v, batch=batch).answer(Triton)
    assert torch.equal(alone, both[:q_len])


@needs_kernels
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_a_recorded_prefill_answers_for_other_lengths(head_dim: int, window: int | None) -> None:
    """Of fewer tiles than there is room for; on a Hopper GPU in bfloat16 by the kernel made for it too."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    subject = Subject(Triton, Phase.PREFILL, make_shape(dtype=dtype, head_dim=head_dim))
    if DEVICE == "cuda":
        assert graph_replay(subject, window) == []
        return
    assert replay_problems(subject, window, capture_fake) == []


@needs_kernels
def test_one_bound_backend_answers_batches_of_any_size_in_turn() -> None:
    shape = make_shape(dtype=torch.float16)
    bound = Triton(Phase.DECODE, shape)
    split, padded = Workload(((1, 600), (1, 5))), WORKLOADS[Phase.DECODE]["padding_rows"]
    for seed, workload in enumerate((split, padded, Workload(((1, 9),)), split)):
        case = make_case(Phase.DECODE, workload, shape, seed=seed)
        assert case.problems(case.answer_of(bound)) == []
    assert bound._decode is not None
    assert not bound._decode.workspace.arrivals.any()


@needs_kernels
@every_phase
def test_a_profiler_sees_what_is_claimed(phase: Phase) -> None:
    case = make_case(phase, MIXED[phase], make_shape())
    case.answer(Triton)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with profile(activities=activities) as seen:
        case.answer(Triton)
    own = KERNELS[phase] if DEVICE == "cuda" else f"triton_interpreted::{KERNELS[phase]}"
    assert any(own in event.name for event in seen.events() or [])


def test_a_claim_names_the_kernel_of_its_phase() -> None:
    for phase, kernel in KERNELS.items():
        assert kernel in Triton.claim(phase, make_shape(device="cuda")).must[0]
        assert Triton.claim(phase, make_shape(device="cpu")).must == (f"^triton_interpreted::{kernel}$",)


@needs_compiler
@every_phase
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_fit_the_least_shared_memory(phase: Phase, head_dim: int, dtype: torch.dtype) -> None:
    options = shipped(phase, make_shape(head_dim=head_dim, dtype=dtype), LEAST_SHARED_MEMORY).few
    stored = options.block_m + 2 * options.block_n * options.num_stages
    assert stored * head_dim * dtype.itemsize <= LEAST_SHARED_MEMORY
    assert options.num_stages >= 2


def test_tables_reach_every_head_dim_and_ascend() -> None:
    tables = [FALLBACK, *(gpu.tables for gpu in KNOWN)]
    for table in (of for each in tables for of in (*each.half.values(), each.many, *each.full.values())):
        sizes = [largest for largest, _ in table]
        assert sizes == sorted(sizes)
        assert sizes[-1] == max(HEAD_DIMS)
        assert all(isinstance(options, Options) for _, options in table)


def load(static: Case, case: Case) -> Case:
    """Write a case into the tensors of another, as the runner does before a replay."""
    pairs = ((static.q, case.q), (static.k, case.k), (static.v, case.v))
    batches = ((static.batch.cu_q_lens, case.batch.cu_q_lens), (static.batch.kv_lens, case.batch.kv_lens))
    for target, source in (*pairs, *batches):
        target[: len(source)].copy_(source)
    table = case.batch.page_table
    static.batch.page_table.zero_()[: len(table), : table.shape[1]].copy_(table)
    batch = replace(static.batch, q_lens_cpu=case.batch.q_lens_cpu, kv_lens_cpu=case.batch.kv_lens_cpu)
    return replace(case, q=static.q, k=static.k, v=static.v, batch=batch)


@needs_cuda
@every_dtype
@pytest.mark.parametrize("window", [None, 300])
def test_a_graph_replays_with_other_lengths_and_pages(dtype: torch.dtype, window: int | None) -> None:
    shape = make_shape(9, 3, 64, dtype=dtype)
    static = make_case(Phase.DECODE, Workload(((1, 3000),) * 4, window=window), shape)
    bound = Triton(Phase.DECODE, static.shape)
    plan = bound.plan_capture(static.batch)
    bound.run(plan, static.q, static.k, static.v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bound.run(plan, static.q, static.k, static.v)
    for seed, lens in enumerate(((1, 700, 2999, 64), (5, 300, 0, 0), (3000,) * 4, (65, 0, 257, 0))):
        workload = Workload(tuple((1, kv_len) for kv_len in lens), window=window)
        case = load(static, make_case(Phase.DECODE, workload, shape, seed=seed))
        case.q[case.batch.kv_lens == 0] = torch.nan
        bound.update_capture(plan, case.batch)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert out.isfinite().all()
        expected, real = case.reference(), case.real_rows()
        assert torch.allclose(out.double()[real], expected[real], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
