"""Compile kernels for sm_90 without a GPU: registers, spills, shared memory, and which matrix instructions were chosen."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from decode import DecodeConfig, PagedDecode, decode_balanced_kernel, decode_split_kernel
from prefill import PrefillConfig, head_parts, packed_kernel, paged_prefill_kernel, tma_prefill_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    "q": "*bf16", "k": "*bf16", "v": "*bf16", "k_pages": "*bf16", "v_pages": "*bf16", "out": "*bf16",
    "page_table": "*i32", "kv_lens": "*i32", "cu_tiles": "*i32", "cu_q_lens": "*i32", "cu_lens": "*i32",
    "part_out": "*fp32", "part_lse": "*fp32", "arrivals": "*i32", "scale_log2": "fp32",
}  # fmt: skip


def compile_one(name: str, kernel: object, constants: dict[str, object], descriptor: str | None = None) -> None:
    """Compile for sm_90 and print one line of what ptxas made of it."""
    options = {k: constants.pop(k) for k in ("num_warps",) if k in constants}
    options["num_stages"] = 3
    names = kernel.arg_names
    constants = {k: v for k, v in constants.items() if k in names}
    signature, attrs = {}, {}
    for i, arg in enumerate(names):
        signature[arg] = "constexpr" if arg in constants else POINTERS.get(arg, "i32")
        if descriptor and arg in ("k_rows", "v_rows"):
            signature[arg] = descriptor
        elif signature[arg].startswith("*") or arg.endswith("_stride") and "table" not in arg:
            attrs[(i,)] = [["tt.divisibility", 16]]
    began = time.time()
    try:
        source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attrs)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        print(f"FAIL {name}: {str(error)[:300]}")
        return
    ptx = built.asm["ptx"]
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    mma = len(re.findall(r"\bmma\.sync", ptx))
    copies = len(re.findall(r"cp\.async\.c", ptx))
    bulk = len(re.findall(r"cp\.async\.bulk\.tensor", ptx))
    bars = len(re.findall(r"bar\.sync", ptx))
    print(
        f"{name:58} {resources(built.asm['cubin'])} smem {built.metadata.shared // 1024:3} KiB "
        f"wgmma {wgmma} mma {mma} cp.async {copies} bulk {bulk} bar {bars} {time.time() - began:.1f} s", flush=True
    )  # fmt: skip


def resources(cubin: bytes) -> str:
    """Registers and stack bytes, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True).stdout
    return " ".join(re.findall(r"(?:REG|STACK):\d+", text))


def main(what: str) -> None:
    """what: decode, prefill or packed."""
    if what == "decode":
        for heads, dim in (((32, 8), 128), ((9, 3), 64)):
            for config in DECODE:
                if heads[1] % config.heads:
                    continue
                decode = PagedDecode(*heads, dim, 0.1, 16, 4, 4096, 132, "cpu", config)
                constants = {**decode.constants(torch.bfloat16), "FUSED": config.fused, "SEQS": 4}
                kernel = decode_balanced_kernel if config.balanced else decode_split_kernel
                compile_one(f"{heads} {dim} {config.name()}", kernel, constants)
    if what in ("prefill", "packed"):
        for dim in (128, 64) if what == "prefill" else (64, 80):
            for config in PREFILL:
                page = 128 if config.tma else 16
                main_part, tail = head_parts(dim, config.cut_head)
                constants = {
                    "Q_HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": dim, "HEAD_MAIN": main_part, "HEAD_TAIL": tail,
                    "PAGE_SIZE": page, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": "tf32",
                    "NUM_STAGES": config.num_stages, "num_warps": config.num_warps, "GROUP": 1,
                }  # fmt: skip
                if what == "packed":
                    compile_one(f"packed {dim} {config.name()}", packed_kernel, constants)
                    continue
                kernel = tma_prefill_kernel if config.tma else paged_prefill_kernel
                descriptor = f"tensordesc<bf16[{config.block_n}, {dim}]>" if config.tma else None
                compile_one(f"prefill {dim} {config.name()}", kernel, constants, descriptor)


DECODE = [
    DecodeConfig(), DecodeConfig(fused=False), DecodeConfig(balanced=True), DecodeConfig(dot="cols"),
    DecodeConfig(dot="cores", block_n=16), DecodeConfig(heads=2, block_n=32), DecodeConfig(heads=3, block_n=32),
    DecodeConfig(block_n=32, num_warps=2), DecodeConfig(block_n=16, num_warps=1), DecodeConfig(block_n=128, num_stages=2),
    DecodeConfig(dot="cols", block_n=128, num_stages=2),
]  # fmt: skip
PREFILL = [
    PrefillConfig(), PrefillConfig(block_n=128, num_stages=2), PrefillConfig(64, 64, 4, 3), PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 2, tma=True), PrefillConfig(128, 64, 8, 4, tma=True), PrefillConfig(128, 64, 4, 3),
    PrefillConfig(cut_head=False),
]  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1])
