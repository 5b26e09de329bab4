"""The Hopper kernel cannot run here, but it compiles: for sm_90, without a GPU."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tessera.attention.backends.triton import uses_hopper_kernel
from tessera.attention.contract import Phase, Shape

pytest.importorskip("triton", reason="triton is not installed")
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

from tessera.kernels import hopper_prefill

POINTERS = {"q": "*bf16", "out": "*bf16", "sinks": "*fp32"} | dict.fromkeys(
    ("page_table", "cu_q_lens", "kv_lens", "tiles"), "*i32"
)
SHAPE = Shape(32, 8, 128, 128**-0.5, torch.bfloat16, "cuda", (9, 0), 16, shared_memory=227 << 10)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "options"),
    [
        (128, 16, {}),
        (64, 128, {"WINDOW": 128, "SOFT_CAP": True, "SINKS": True}),
    ],
)
def test_it_compiles_into_asynchronous_products_and_copies(
    head_dim: int, page_size: int, options: dict[str, Any]
) -> None:
    ptx = _compile(head_dim, page_size, options)
    assert "wgmma.mma_async" in ptx  # not the older products, which take several times as long
    assert "cp.async.bulk.tensor" in ptx
    assert re.search(r"setmaxnreg\.dec\S+\s+24;", ptx)  # the copying warp gives its registers away


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"head_dim": 80}, False),
        ({"head_dim": 64}, False),
        ({"page_size": 8}, False),
        ({"dtype": torch.float32}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (10, 0)}, False),
    ],
)
def test_it_is_used_where_it_can_run_only(changes: dict[str, Any], used: bool) -> None:
    shape = Shape(**(SHAPE.__dict__ | changes))
    assert uses_hopper_kernel(Phase.PREFILL, shape) is used
    assert not uses_hopper_kernel(Phase.DECODE, shape)


def _compile(head_dim: int, page_size: int, options: dict[str, Any]) -> str:
    """PTX for sm_90."""
    tokens = hopper_prefill.block_n(head_dim)
    box = min(page_size, tokens)
    constants: dict[str, Any] = {
        "Q_HEAD_STRIDE": head_dim,
        "HEADS": 8,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BOX": box,
        "BLOCK_M": hopper_prefill.BLOCK_M,
        "BLOCK_N": tokens,
        "STAGES": hopper_prefill.STAGES,
        "CAUSAL": True,
        "WINDOW": 0,
        "SOFT_CAP": False,
        "SINKS": False,
    } | options
    kernel = hopper_prefill.hopper_prefill_kernel
    layout = NVMMASharedLayout.get_default_for([box, head_dim], bfloat16)
    kinds = POINTERS | dict.fromkeys(("scale_log2", "cap_log2"), "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16[{box}, {head_dim}],{layout!r}>")
    names = kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("q", "out", "q_stride", "out_stride")}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(kernel, {name: kinds.get(name, "i32") for name in names}, values, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return str(built.asm["ptx"])
