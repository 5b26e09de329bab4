"""The rungs of prefill against the oracle: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.attention.backends.triton import Triton, uses_hopper_kernel
from tessera.attention.backends.triton_ladder import TritonFa1, TritonFa2, TritonTwoPass
from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.workloads import WORKLOADS, Workload, make_case
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    every_dtype,
    needs_compiler,
    needs_kernels,
    outside_interpreter,
)

RUNGS: list[type[AttentionBackend[Any]]] = [TritonTwoPass, TritonFa1, TritonFa2]
MIXED = {
    Phase.PREFILL: Workload(((19, 19), (7, 40), (70, 90))),
    Phase.VISION: Workload(((19, 19), (70, 70))),
}
FEATURES = {
    Phase.PREFILL: (
        Workload(((70, 90), (3, 70)), window=20, soft_cap=5.0, sinks=True),
        Workload(((70, 90), (3, 70)), window=20, causal=False),
        Workload(((5, 90), (70, 70)), sinks=True, causal=False),
    ),
    Phase.VISION: (Workload(((90, 90), (3, 3)), window=20, soft_cap=5.0, sinks=True),),
}
PHASES = list(MIXED)
every_rung = pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
every_phase = pytest.mark.parametrize("phase", PHASES)
HOPPER = Shape(32, 8, 128, 128**-0.5, torch.bfloat16, "cuda", (9, 0), 16, shared_memory=227 << 10)


def make_shape(head_dim: int = 32, dtype: torch.dtype = torch.float32, q_heads: int = 6) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(q_heads, 2, head_dim, head_dim**-0.5, dtype, DEVICE, capability, 16)


def check(rung: type[AttentionBackend[Any]], phase: Phase, workload: Workload, shape: Shape) -> None:
    case = make_case(phase, workload, shape)
    assert rung.reasons_against(phase, case.shape) == []
    assert case.problems(case.answer(rung)) == []


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_rung
@every_phase
@every_dtype
def test_rung_equals_the_oracle(rung: type[AttentionBackend[Any]], phase: Phase, dtype: torch.dtype) -> None:
    check(rung, phase, MIXED[phase], make_shape(dtype=dtype))


@needs_kernels
@every_rung
@every_phase
def test_features_work_together(rung: type[AttentionBackend[Any]], phase: Phase) -> None:
    for workload in FEATURES[phase]:
        check(rung, phase, workload, make_shape())


@needs_kernels
@every_rung
@pytest.mark.parametrize("name", ["one_token", "one_token_chunk", "sinks", "window_with_chunk", "bidirectional"])
def test_workload_equals_the_oracle(rung: type[AttentionBackend[Any]], name: str) -> None:
    check(rung, Phase.PREFILL, WORKLOADS[Phase.PREFILL][name], make_shape(dtype=torch.float16))


@needs_kernels
@every_rung
@pytest.mark.parametrize(("head_dim", "q_heads"), [(80, 2), (96, 8), (128, 14), (256, 4)])
def test_heads_equal_the_oracle(rung: type[AttentionBackend[Any]], head_dim: int, q_heads: int) -> None:
    check(rung, Phase.PREFILL, MIXED[Phase.PREFILL], make_shape(head_dim, torch.float16, q_heads))


@needs_kernels
@every_rung
def test_strided_queries_and_slots_of_garbage_change_nothing(rung: type[AttentionBackend[Any]]) -> None:
    case = make_case(Phase.PREFILL, MIXED[Phase.PREFILL], make_shape(dtype=torch.float16))
    wide = torch.full((len(case.q), 9, 32), torch.nan, dtype=case.q.dtype, device=DEVICE)
    wide[:, 1:7] = case.q
    live = torch.zeros(case.k.shape[:2], dtype=torch.bool)
    for row, kv_len in zip(case.batch.page_table.tolist(), case.batch.kv_lens_cpu):
        for position in range(kv_len):
            live[row[position // 16], position % 16] = True
    k, v = (_poisoned(pool, live) for pool in (case.k, case.v))
    assert torch.equal(replace(case, q=wide[:, 1:7], k=k, v=v).answer(rung), case.answer(rung))


def _poisoned(pool: Tensor, live: Tensor) -> Tensor:
    return pool.where(live.to(pool.device)[:, :, None, None], torch.nan)


@needs_kernels
@pytest.mark.parametrize("rung", [TritonTwoPass, TritonFa1], ids=lambda rung: rung.name)
def test_a_sink_of_no_weight_is_none_where_a_tile_of_keys_is_hidden(rung: type[AttentionBackend[Any]]) -> None:
    case = make_case(Phase.PREFILL, Workload(((70, 90),), window=20, sinks=True), make_shape())
    assert case.sinks is not None
    case.sinks.fill_(-torch.inf)
    assert case.problems(case.answer(rung)) == []


@needs_kernels
def test_what_fa1_left_in_its_state_does_not_matter() -> None:
    case = make_case(Phase.PREFILL, MIXED[Phase.PREFILL], make_shape())
    bound = TritonFa1(Phase.PREFILL, case.shape)
    plan = bound.plan(case.batch)
    assert plan.state is not None
    for tensor in plan.state:
        tensor.fill_(torch.nan)
    for _ in range(2):  # two layers of one step
        assert case.problems(bound.run(plan, case.q, case.k, case.v)) == []


@every_rung
def test_a_rung_names_its_idea_and_a_kernel_of_its_own(rung: type[AttentionBackend[Any]]) -> None:
    assert rung.rung and len(rung.rung) < 90
    claims = {each.claim(Phase.PREFILL, HOPPER).must for each in RUNGS}
    assert len(claims) == len(RUNGS)
    assert Phase.DECODE not in rung.limits


def test_fa2_is_the_kernel_of_every_gpu_on_a_hopper_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TritonFa2.claim(Phase.PREFILL, HOPPER).must == ("^paged_prefill_kernel",)
    monkeypatch.setattr("tessera.attention.backends.triton.device_resources", lambda _: (132, 227 << 10))
    bound = TritonFa2(Phase.PREFILL, replace(HOPPER, device_type="cpu", capability=(9, 0)))
    assert uses_hopper_kernel(Phase.PREFILL, HOPPER) and not bound._hopper


@needs_compiler
@pytest.mark.parametrize(("name", "head_dim"), [("two_pass", 128), ("fa1", 128), ("fa1", 80)])
def test_it_compiles_for_hopper_into_tensor_core_products(name: str, head_dim: int) -> None:
    from importlib import import_module

    from tessera.attention.backends.triton_choice import shipped
    from tessera.kernels.packed import head_parts

    options = shipped(Phase.PREFILL, replace(HOPPER, head_dim=head_dim), HOPPER.shared_memory).few.arguments()
    options |= {"NUM_STAGES": 1} if name == "fa1" else {}
    main, tail = head_parts(head_dim)
    constants: dict[str, Any] = options | {
        "HEADS": 32, "Q_HEAD_STRIDE": head_dim, "K_HEAD_STRIDE": head_dim, "V_HEAD_STRIDE": head_dim, "GROUP": 4,
        "HEAD_DIM": head_dim, "HEAD_MAIN": main, "HEAD_TAIL": tail, "PAGE_SIZE": 16, "CAUSAL": True, "WINDOW": 0,
        "SOFT_CAP": False, "SINKS": False, "PRECISION": "tf32",
    }  # fmt: skip
    num_warps = constants.pop("num_warps")
    kernel = getattr(import_module(f"tessera.kernels.{name}"), f"{name}_kernel")
    kinds = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(("scale_log2", "cap_log2"), "fp32")
    kinds |= dict.fromkeys(("page_table", "cu_q_lens", "kv_lens"), "*i32")
    kinds |= dict.fromkeys(("sinks", "answers", "peaks", "totals"), "*fp32")
    known = {each: value for each, value in constants.items() if each in kernel.arg_names}
    ptx = compile_for_hopper(kernel, kinds, known, num_warps)
    assert "wgmma.mma_async" in ptx or "mma.sync" in ptx


def test_rungs_whose_launch_follows_the_step_are_not_recorded() -> None:
    """Their grid, or their state, is that of the step they were launched for: a graph would serve others wrongly."""
    recorded = {rung.name: rung.limits[Phase.PREFILL].graphs for rung in (TritonTwoPass, TritonFa1, TritonFa2, Triton)}
    assert recorded == {"triton:two_pass": False, "triton:fa1": False, "triton:fa2": False, "triton": True}
