"""The Hopper kernel cannot run here, but it compiles: for sm_90, without a GPU."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from tessera.attention.backends.triton import WORTH_HOPPER, Triton, TritonPlan, uses_hopper_kernel
from tessera.attention.contract import Phase, Shape
from tessera.attention.workloads import Workload, make_batch, make_case

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

from tessera.kernels import hopper_prefill, hopper_tiles
from tessera.kernels.packed import head_parts

POINTERS = {"q": "*bf16", "out": "*bf16", "sinks": "*fp32"} | dict.fromkeys(
    ("page_table", "cu_q_lens", "kv_lens", "tiles"), "*i32"
)
SHAPE = Shape(32, 8, 128, 128**-0.5, torch.bfloat16, "cuda", (9, 0), 16, shared_memory=227 << 10)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "options"),
    [
        (128, 16, {}),
        (256, 128, {"WINDOW": 128, "SOFT_CAP": True, "SINKS": True}),
        (64, 16, {"GROUP": 3}),
        (96, 32, {}),
        (160, 16, {}),
        (64, 0, {"CAUSAL": False}),
        (72, 0, {"CAUSAL": False}),
    ],
)
def test_it_compiles_into_asynchronous_products_and_copies(
    head_dim: int, page_size: int, options: dict[str, Any]
) -> None:
    ptx = _compile(head_dim, page_size, options)
    assert "wgmma.mma_async" in ptx  # not the older products, which take several times as long
    assert "cp.async.bulk.tensor" in ptx
    before = re.split(r"wgmma|cp\.async\.bulk|ld\.global|st\.global", ptx, maxsplit=1)[0]
    assert "griddepcontrol.launch_dependents" in before and "griddepcontrol.wait" in before
    assert re.search(r"setmaxnreg\.dec\S+\s+24;", ptx)  # the copying warp gives its registers away


@pytest.mark.parametrize(
    ("changes", "prefill", "vision"),
    [
        ({}, True, False),
        ({"head_dim": 80}, True, True),
        ({"head_dim": 72}, True, True),
        ({"head_dim": 64}, True, True),
        ({"head_dim": 96}, True, False),
        ({"head_dim": 32}, False, False),
        ({"head_dim": 256}, True, False),
        ({"page_size": 8}, False, False),
        ({"dtype": torch.float32}, False, False),
        ({"capability": (8, 0)}, False, False),
        ({"capability": (10, 0)}, False, False),
        ({"head_dim": 80, "capability": (8, 0)}, False, False),
    ],
)
def test_it_is_used_where_it_can_run_only(changes: dict[str, Any], prefill: bool, vision: bool) -> None:
    shape = Shape(**(SHAPE.__dict__ | changes))
    assert uses_hopper_kernel(Phase.PREFILL, shape) is prefill
    assert uses_hopper_kernel(Phase.VISION, shape) is vision
    assert not uses_hopper_kernel(Phase.DECODE, shape)


@pytest.mark.parametrize(("length", "worth"), [(1024, False), (4096, True)])
def test_packed_batches_go_to_it_from_some_size_on(length: int, worth: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(16, 16, 80, 80**-0.5, torch.bfloat16, "cuda", (9, 0), None, causal=False, shared_memory=227 << 10)
    for module in ("triton", "triton_choice"):
        monkeypatch.setattr(f"tessera.attention.backends.{module}.device_resources", lambda _: (132, 227 << 10))
    monkeypatch.setattr("tessera.attention.backends.triton_choice.gpu_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr("tessera.attention.tune_store.read", lambda *_: None)
    assert (4 * length**2 * 16 * 80 >= WORTH_HOPPER) is worth
    batch = make_batch(((length, length),), torch.zeros(1, 0, dtype=torch.int32), 0, "cpu")
    plan = Triton(Phase.VISION, shape).plan(batch)
    assert isinstance(plan, TritonPlan)
    assert plan.max_programs == (132 if worth else 0)
    assert len(plan.tiles) == -(-length // 128)
    for kernel in ("hopper_prefill_kernel", "packed_kernel"):
        assert re.search(Triton.claim(Phase.VISION, shape).must[0], kernel)


class _Programs:
    """Gluon's language, as program `number` of so many sees it, on whole numbers."""

    def __init__(self, number: int, programs: int) -> None:
        self.program_id, self.num_programs = lambda _: number, lambda _: programs

    @staticmethod
    def where(condition: bool, there: int, other: int) -> int:
        return there if condition else other


def test_every_tile_has_one_turn_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the programs with as many tiles none has the longer one, which stand first, in every round."""
    nth_number, count_turns = hopper_tiles.nth_number.fn, hopper_tiles.count_turns.fn
    monkeypatch.setattr(hopper_tiles, "nth_number", nth_number)
    for programs in (1, 2, 3, 7, 132):
        for num_tiles in (0, 1, programs - 1, programs, programs + 1, 2 * programs, 3 * programs + 2, 90, 1000):
            taken = []
            for number in range(programs):
                monkeypatch.setattr(hopper_tiles, "gl", _Programs(number, programs))
                taken.append([nth_number(turn) for turn in range(count_turns(num_tiles))])
            assert sorted(tile for tiles in taken for tile in tiles) == list(range(num_tiles))
            whole = num_tiles // programs // 2 * 2
            assert len({sum(tiles[:whole]) for tiles in taken}) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper GPU is here"
)
@pytest.mark.parametrize("max_programs", [1, 3])
@pytest.mark.parametrize("num_seqs", [1, 2, 3, 4, 7])
def test_few_programs_that_take_many_tiles_answer_as_the_oracle_does(num_seqs: int, max_programs: int) -> None:
    class Few(Triton):
        def plan(self, batch: Any) -> Any:
            plan = super().plan(batch)
            assert isinstance(plan, TritonPlan) and plan.max_programs
            return replace(plan, max_programs=max_programs)

    for head_dim, kv_heads in ((128, 1), (64, 2)):
        shape = replace(SHAPE, num_q_heads=4 * kv_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        lens = tuple((1 + 29 * i % 70, 1 + 29 * i % 70 + 40 * (i % 2)) for i in range(num_seqs))
        case = make_case(Phase.PREFILL, Workload(lens), shape)
        assert not case.problems(case.answer_of(Few(Phase.PREFILL, shape)))


def _compile(head_dim: int, page_size: int, options: dict[str, Any]) -> str:
    """PTX for sm_90."""
    chosen = hopper_prefill.hopper_options(head_dim, paged=page_size > 0)
    main, tail = head_parts(head_dim)
    box = min(page_size or chosen.block_n, chosen.block_n)
    constants: dict[str, Any] = {
        "Q_HEAD_STRIDE": head_dim,
        "HEADS": 8,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "MAIN": main,
        "TAIL": tail,
        "PAGE_SIZE": page_size,
        "BOX": box,
        "BLOCK_M": hopper_prefill.BLOCK_M,
        "BLOCK_N": chosen.block_n,
        "STAGES": chosen.stages,
        "CAUSAL": True,
        "WINDOW": 0,
        "SOFT_CAP": False,
        "SINKS": False,
        "EARLY": chosen.early,
        "TAKE_TURNS": chosen.take_turns,
        "WARPGROUPS": chosen.warpgroups,
        "PDL": True,
    } | options
    kernel = hopper_prefill.hopper_prefill_kernel
    kinds = POINTERS | dict.fromkeys(("scale_log2", "cap_log2"), "fp32") | dict.fromkeys(constants, "constexpr")
    for name, width in (("desc", main), ("tail_desc", tail or main)):
        layout = NVMMASharedLayout.get_default_for([box, width], bfloat16)
        kinds |= dict.fromkeys((f"k_{name}", f"v_{name}"), f"tensordesc<bf16[{box}, {width}],{layout!r}>")
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("q", "out", "q_stride", "out_stride")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, {name: kinds.get(name, "i32") for name in names}, values, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})
    return str(built.asm["ptx"])
