"""FlashDecoding++: right whatever the one maximum is, and honest about what it computed twice."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import replace
from math import log

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tessera.attention.backends.triton_decode import TritonFlashDecoding, TritonFlashDecodingPP
from tessera.attention.calibrate import SAFE_LOG2, Calibration
from tessera.attention.contract import Phase, Shape
from tessera.attention.registry import load_checked
from tessera.attention.workloads import DECODES, Case, Workload, make_case
from tessera.kernels.paged_decode import Queries, constants
from tessera.kernels.scores import Scores
from tessera.kernels.unified_decode import unified_decode_kernel
from triton_interpreter import (
    DEVICE,
    check_in_interpreter,
    compile_for_hopper,
    every_dtype,
    loads_before_waiting,
    merges_what_others_wrote,
    needs_compiler,
    needs_kernels,
    outside_interpreter,
)

# What overflows is computed again.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
SPLIT = Workload(((1, 600), (1, 5), (1, 0), (1, 130)))
"""Two parts or more of some sequences, one of others, none of one."""


def make_shape(dtype: torch.dtype = torch.float16, q_heads: int = 6, kv_heads: int = 2) -> Shape:
    capability = torch.cuda.get_device_capability() if DEVICE == "cuda" else (0, 0)
    return Shape(q_heads, kv_heads, 32, 32**-0.5, dtype, DEVICE, capability, 16)


def check(case: Case, unified_max: float) -> int:
    """The answer is the oracle's; how many parts were computed twice for it."""
    bound = TritonFlashDecodingPP(Phase.DECODE, case.shape, unified_max)
    plan = bound.plan(case.batch)
    assert case.problems(bound.run(plan, case.q, case.k, case.v, case.sinks)) == []
    assert not bound._decode.workspace.arrivals.any()
    return bound.recomputed()


@pytest.mark.timeout(600)
@outside_interpreter
def test_in_the_interpreter() -> None:
    check_in_interpreter(__file__)


@needs_kernels
@every_dtype
@pytest.mark.parametrize("name", DECODES)
def test_workload_equals_the_oracle(dtype: torch.dtype, name: str) -> None:
    check(make_case(Phase.DECODE, DECODES[name], make_shape(dtype)), 0.0)


@needs_kernels
@every_dtype
@pytest.mark.parametrize("sinks", [False, True])
def test_a_maximum_far_off_is_found_out_and_made_good(dtype: torch.dtype, sinks: bool) -> None:
    case = make_case(Phase.DECODE, replace(SPLIT, sinks=sinks), make_shape(dtype))
    bound = TritonFlashDecodingPP(Phase.DECODE, case.shape)
    splits = bound.plan(case.batch).shares.num_splits
    assert splits > 1
    assert check(case, 0.0) == 0
    twice = {check(case, unified_max) for unified_max in (-80.0, 80.0, -1e4, 1e4)}
    assert len(twice) == 1  # every part, either way
    assert twice.pop() >= 2 * (splits + 2)


@needs_kernels
def test_only_parts_with_a_row_out_of_range_are_computed_twice() -> None:
    """One query head of one sequence fits one key too well, in a number that the others have no weight for."""
    case = make_case(Phase.DECODE, SPLIT, make_shape())
    page, slot = int(case.batch.page_table[0, 3]), 5
    case.q[0, :, 0] = 0.0
    assert check(case, 0.0) == 0
    case.q[0, 1] = 0.0
    case.q[0, 1, 0], case.k[page, slot, 0, 0] = 1.0, 1000.0  # a score of 177
    assert check(case, 0.0) == 1


@needs_kernels
@every_dtype
def test_the_safe_range_is_kept_at_both_ends(dtype: torch.dtype) -> None:
    """Every score of the case is s: phi may be as far from it as the range says, and no farther."""
    case = make_case(Phase.DECODE, Workload(((1, 300), (1, 40))), make_shape(dtype))
    score, (low, high) = 4.0, SAFE_LOG2[dtype]
    case.q.fill_(1.0)
    case.k.fill_(score / 32**0.5)
    for distance, safe in ((low + 0.1, True), (low - 0.1, False), (high - 0.1, True), (high + 0.1, False)):
        assert (check(case, score - distance * log(2)) == 0) is safe


@needs_kernels
def test_large_logits_are_right_with_the_maximum_that_a_calibration_finds() -> None:
    """Prompts whose scores all lie far from 0: a wrong maximum computes all twice, the one that is found few."""
    shape = make_shape()
    case = make_case(Phase.DECODE, SPLIT, shape)
    case.q[:] = 2.0 + 0.1 * case.q
    live = case.k.abs() < 10  # the rest is garbage
    case.k[:] = torch.where(live, 3.0 + 0.1 * case.k, case.k)
    calibration = Calibration([shape])
    prompt = 3.0 + 0.1 * torch.randn(200, 2, 32)
    calibration.observe(0, 2.0 + 0.1 * torch.randn(200, 6, 32), prompt, [200])
    found = calibration.find(torch.float16)
    assert 25 < found.phi < 45
    assert found.model.safe_share > 0.99
    assert check(case, 0.0) > 4
    assert check(case, found.phi) == 0


@needs_kernels
def test_garbage_in_the_workspace_reaches_no_answer() -> None:
    case = make_case(Phase.DECODE, SPLIT, make_shape())
    case.q[2] = torch.nan  # of a padding row
    for unified_max in (0.0, 1e4):
        bound = TritonFlashDecodingPP(Phase.DECODE, case.shape, unified_max)
        workspace = bound._decode.workspace
        for buffer in (workspace.part_out, workspace.part_lse, workspace.part_peak):
            buffer.fill_(torch.nan)
        out = bound.run(bound.plan(case.batch), case.q, case.k, case.v)
        assert case.problems(out) == []
        assert not out[2].any()


@needs_kernels
def test_more_heads_a_group_than_rows_a_tile_equal_the_oracle() -> None:
    for dtype in (torch.float32, torch.float16):
        for unified_max in (0.0, 100.0):
            check(make_case(Phase.DECODE, Workload(((1, 300), (1, 9))), make_shape(dtype, 40, 1)), unified_max)


@needs_kernels
def test_it_shares_out_as_flash_decoding_so_that_only_the_softmax_differs() -> None:
    case = make_case(Phase.DECODE, SPLIT, make_shape())
    plans = [of(Phase.DECODE, case.shape).plan(case.batch) for of in (TritonFlashDecoding, TritonFlashDecodingPP)]
    assert plans[0].shares == plans[1].shares
    assert plans[0].options == plans[1].options


@needs_compiler
def test_it_compiles_for_hopper_into_asynchronous_copies_and_products() -> None:
    options = {"BLOCK_N": 64, "NUM_STAGES": 5, "num_warps": 2}
    compiled = constants(Queries(torch.bfloat16, 32, 8, 128, 128), False, Scores(0.1, None, None), 1, options)
    num_warps = compiled.pop("num_warps")
    del compiled["QUERIES"]
    compiled |= {"K_HEAD_STRIDE": 128, "V_HEAD_STRIDE": 128, "PAGE_SIZE": 16, "LOWEST": -64.0, "HIGHEST": 64.0}
    compiled["PDL"] = True
    kinds = dict.fromkeys(("q", "k", "v", "out"), "*bf16") | dict.fromkeys(
        ("page_table", "kv_lens", "arrivals"), "*i32"
    )
    kinds |= dict.fromkeys(("sinks", "part_out", "part_total", "part_peak"), "*fp32") | {"recomputed": "*i64"}
    kinds |= dict.fromkeys(("phi_log2", "scale_log2", "cap_log2"), "fp32")
    ptx = compile_for_hopper(unified_decode_kernel, kinds, compiled, num_warps)
    assert "cp.async" in ptx
    assert "mma" in ptx
    assert merges_what_others_wrote(ptx)
    assert loads_before_waiting(ptx) == 0


def test_the_rungs_have_their_names_and_are_left_to_be_named() -> None:
    for name, kernel in (
        ("triton:paged", "paged_decode_kernel"),
        ("triton:flash_decoding", "paged_decode_kernel"),
        ("triton:flash_decoding_pp", "unified_decode_kernel"),
    ):
        backend = load_checked(name)
        assert backend.name == name
        assert backend.rung
        assert set(backend.limits) == {Phase.DECODE}
        assert backend.limits[Phase.DECODE].graphs
        assert backend.claim(Phase.DECODE, replace(make_shape(), device_type="cuda")).must == (f"^{kernel}",)
