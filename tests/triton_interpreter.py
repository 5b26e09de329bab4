"""Where Triton kernels run in a test: on the GPU where there is one, else in Triton's interpreter.

Triton decides when a kernel is defined whether to interpret it, so without a GPU a test file runs itself again in a
process of its own. The interpreter of triton 3.9 multiplies bfloat16 wrongly, so that type needs a GPU.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.attention.contract import import_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
MISSING = import_error("triton")
RUNS = MISSING is None and (INTERPRETED or DEVICE == "cuda")
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TWO_DTYPES = [torch.float32, DTYPES[-1]]
"""One half type for both, which kernels differ in by nothing but rounding: for tests whose every case is compiled."""
NOT_HERE = "runs on a GPU, or within test_in_the_interpreter"

needs_kernels = pytest.mark.skipif(not RUNS, reason=MISSING or NOT_HERE)
needs_cuda = pytest.mark.skipif(DEVICE != "cuda" or not RUNS, reason=MISSING or "a CUDA device is needed")
needs_compiler = pytest.mark.skipif(MISSING is not None or INTERPRETED, reason=MISSING or "compiles outside only")
outside_interpreter = pytest.mark.skipif(
    MISSING is not None or INTERPRETED or DEVICE == "cuda", reason=MISSING or "the tests below run here"
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check_in_interpreter(file: str) -> None:
    """Run a test file's own tests under the interpreter; they all pass and none is left out for want of it."""
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", str(Path(file).resolve())],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert NOT_HERE not in result.stdout


def compile_for_hopper(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], num_warps: int) -> str:
    """PTX for sm_90, made without a GPU; every pointer and stride is taken to be aligned, as those of models are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if name not in constants and (signature[name].startswith("*") or name.endswith(("stride", "size")))
    }
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def loads_before_waiting(ptx: str) -> int:
    """How many loads each program of a dependent launch makes before it waits for the launch before it.

    AssertionError where one may leave or write before that, or wait twice, or keeps the next launch from starting.
    """
    assert ptx.count("griddepcontrol.wait") == 1
    before, _, _ = re.sub("//.*", "", ptx[ptx.index(".entry") :]).partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert not re.search(r"\b(st\.global|atom\.|red\.|bra|ret|exit|cp\.async)\b", before)
    return len(re.findall(r"\bld\.global", before))


def merges_what_others_wrote(ptx: str) -> bool:
    """Whether a program arrives after all its threads have written, for the whole GPU to see, and reads past its L1.

    The interpreter runs one program after the other and would not notice.
    """
    before, counter, after = ptx.partition("atom.global.gpu.acq_rel.add")
    return bool(counter) and "bar.sync" in before[before.rindex("st.global") :] and "ld.global.cg" in after


def ulps_apart(found: Tensor, expected: Tensor) -> int:
    """The most representable numbers between any pair: 0 for the same bits (or 0 and -0)."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    first, second = (_ordered(x.detach().cpu().contiguous()) for x in (found, expected))
    return int((first - second).abs().max()) if first.numel() else 0


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of the floating-point numbers, one apart where these are neighbours."""
    bits = x.view(torch.int32 if x.dtype == torch.float32 else torch.int16).long()
    lowest = torch.iinfo(torch.int32 if x.dtype == torch.float32 else torch.int16).min
    return torch.where(bits >= 0, bits, lowest - bits)
