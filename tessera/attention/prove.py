"""Proof of what ran: kernels as a profiler saw them, held against the backend's claim and against a table of our own.

The table keeps a claim honest: whoever is named after a library must launch that library's kernels and
no other's, whatever it claims.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tessera.attention.contract import AttentionBackend, Claim, Phase
from tessera.attention.step import Attention, Bucket
from tessera.attention.timing import make_inputs
from tessera.errors import BackendError
from tessera.types import AttentionProof, KernelUse

SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"pytorch_flash", ("torch_sdpa:flash",)),
    (r"cudnn.*(sdpa|flash)", ("torch_sdpa:cudnn",)),
    (r"fmha_cutlass", ("torch_sdpa:efficient", "xformers")),
    (r"flashinfer|Batch(Prefill|Decode)With(Paged|Ragged)KVCache", ("flashinfer",)),
    (r"FlashAttnFwd(Sm90|Combine)", ("flash_attn:3",)),
    (r"(?i)flash_?attn[_.]?cute|kernel_cutlass.*flash|FlashAttention(Forward|Combine|Decode)", ("flash_attn:4",)),
    (r"flash_fwd_(splitkv_)?(combine_)?kernel", ("flash_attn:2",)),
    (r"triton_.*flex|^graph_\d+_kernel$", ("flex",)),
    (r"^((paged|unified)_decode|(paged|hopper)_prefill|packed|two_pass|fa1)_kernel|^triton_interpreted::", ("triton",)),
    (r"aten::_scaled_dot_product_flash_attention_for_cpu", ("torch_sdpa:flash",)),
    (r"aten::_scaled_dot_product_attention_math", ("torch_sdpa:math",)),
)
"""Whose kernel or operator a name belongs to; the first pattern that is found decides."""
_PLAIN = ("naive", "torch_sdpa", "torch_sdpa:math")
"""Backends that may run on products and softmaxes, which tell nobody's name: only others' kernels are held against
them."""
_LIBRARIES = {family.partition(":")[0] for _, families in SIGNATURES for family in families} | {"naive"}


def profile_kernels(call: Callable[[], object], device_type: str, claimed: Sequence[str] = ()) -> list[KernelUse]:
    """The CUDA kernels, on a CPU the operators and marked ranges, that `call` launches, most time first.

    An operator's time is its own, without the operators that it calls; one that a pattern of `claimed` is found in
    has theirs as well, and they have none, so that all times add up to the time of the call. `call` may be anything,
    the replay of a captured graph too; warm it up before, lest its compilation be seen.
    Raises BackendError where the profiler sees nothing.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes a line to stderr at every start and stop
    on_cuda = device_type == "cuda"
    events = _cuda_events(call) if on_cuda else _cpu_events(call)
    calls = Counter(event.name for event in events)
    times: defaultdict[str, float] = defaultdict(float)
    for event, spent in _device_times(events) if on_cuda else ((each, each.self_cpu_time_total) for each in events):
        times[event.name if on_cuda else _billed(event, claimed)] += spent
    if not calls:
        raise BackendError(
            "the profiler saw nothing run, so that nothing can be proven: another profiler may be attached, or reading "
            "the GPU's counters may be forbidden",
            "end the other profiler, or use --no-prove-attention to run unproven",
        )
    uses = [KernelUse(name, calls[name], round(times[name], 3)) for name in calls]
    return sorted(uses, key=lambda use: -use.microseconds)


def _billed(event: Any, claimed: Sequence[str]) -> str:
    """Whose time an operator's is: that of the nearest claimed one that it is part of, itself included."""
    caller = event
    while caller is not None:
        if any(re.search(pattern, caller.name) for pattern in claimed):
            return str(caller.name)
        caller = caller.cpu_parent
    return str(event.name)


def _device_times(events: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Each event with its microseconds, without those in which it waited for the one before it.

    A kernel that is launched dependently is on the device while the kernel before it is still at work. Kernels of one
    stream end as they begin; beside a second stream times are those in which no earlier one ends.
    """
    over = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        start, end = event.time_range.start, event.time_range.end
        yield event, float(end - max(start, over))
        over = end


def _cuda_events(call: Callable[[], object]) -> list[Any]:
    """What ran on the device, copies included."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    torch.cuda.synchronize()  # what was launched before is none of this
    # Without `acc_events` torch warns that a second cycle would forget the events of the first; there is one.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    return [
        event
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def _cpu_events(call: Callable[[], object]) -> list[Any]:
    """Operators and marked ranges; by the profiler below torch.profiler, which would import its compiler first."""
    from torch.autograd.profiler import profile

    with profile(use_kineto=True) as profiler:
        call()
    return list(profiler.function_events or ())


@torch.inference_mode()
def prove_alone(backend: AttentionBackend[Any], size: Bucket) -> list[KernelUse]:
    """The kernels that a bound backend is seen to launch on its own shape, those of its claim.

    Raises BackendError, naming what was claimed and what ran, where they are not what its claim or its name says.
    """
    shape = backend.shape
    inputs = make_inputs(backend.phase, shape, size, max_copies=1)
    plan = backend.plan(inputs.batch)
    backend.run(plan, *inputs.copies[0])
    return prove_call(backend, lambda: backend.run(plan, *inputs.copies[0]))


def prove_call(backend: AttentionBackend[Any], call: Callable[[], object]) -> list[KernelUse]:
    """The kernels of a backend's claim that `call` is seen to launch; it is warm, and runs this backend and no other.

    Raises BackendError as `prove_alone` does.
    """
    claim = backend.claim(backend.phase, backend.shape)
    uses = profile_kernels(call, backend.shape.device_type, claim.must)
    problems = claim_problems(claim, uses) + family_problems(backend.name, uses)
    if backend.name.partition(":")[0] in _LIBRARIES and backend.name not in _PLAIN and not _own(backend.name, uses):
        problems.append(f"no kernel known to be of {backend.name} ran")
    _refuse(backend, claim, problems, uses)
    return _claimed(claim, uses)


def claim_problems(claim: Claim, uses: Iterable[KernelUse]) -> list[str]:
    """How what ran differs from a claim; a claim that says nothing is a problem too."""
    names = [use.name for use in uses]
    problems = [] if claim.must else ["it claims no kernel"]
    for pattern in claim.must:
        if re.search(pattern, ""):
            problems.append(f"its claim {pattern!r} matches anything")
        elif not any(re.search(pattern, name) for name in names):
            problems.append(f"no kernel matches its claim {pattern!r}")
    for pattern in claim.must_not:
        problems += [f"{name:.100} ran, which it claims not to launch" for name in names if re.search(pattern, name)]
    return problems


def family_problems(backend: str, uses: Iterable[KernelUse]) -> list[str]:
    """Kernels of another attention library than the one a backend is named after."""
    if backend.partition(":")[0] not in _LIBRARIES:
        return []  # a name of its own may stand on any library, as long as it claims so
    return [
        f"{use.name:.100} ran, which belongs to {' or '.join(families)}"
        for use in uses
        if (families := _families(use.name)) and not _is_own(backend, families)
    ]


def prove_in_model(
    attention: Attention, phase: Phase, size: Bucket, call: Callable[[], object], device: str
) -> AttentionProof:
    """Profile `call`, which runs a step of this size of the whole model, and prove what attended in it.

    Proves the same backends alone first. BackendError where a claimed kernel is missing, runs less often than
    there are layers, or another library's attention runs as well.
    """
    bound = attention.serving(phase, size)
    for backend in bound:
        prove_alone(backend, size)
    call()
    claims = [backend.claim(phase, backend.shape) for backend in bound]
    uses = profile_kernels(call, bound[0].shape.device_type, [pattern for claim in claims for pattern in claim.must])
    claimed: dict[str, KernelUse] = {}
    for group, (backend, claim) in enumerate(zip(bound, claims)):
        own = _claimed(claim, uses)
        claimed |= {use.name: use for use in own}
        musts = Claim(claim.must)
        problems = claim_problems(musts, uses) + family_problems(backend.name, uses)
        num_calls, num_layers = sum(use.calls for use in own), attention.num_layers(group)
        if num_calls < num_layers:
            problems.append(f"its kernels ran {num_calls} times in {num_layers} layers")
        _refuse(backend, claim, problems, uses)
    total = sum(use.microseconds for use in uses)
    share = sum(use.microseconds for use in claimed.values()) / total if total else 0.0
    return _proof(bound[0], list(claimed.values()), round(share, 4), size.label, device)


def proof_alone(backend: AttentionBackend[Any], size: Bucket, device: str) -> AttentionProof:
    """The proof of a bound backend where no step of the model is at hand; BackendError as for `prove_alone`."""
    return proof_of(backend, prove_alone(backend, size), size.label, device)


def proof_of(backend: AttentionBackend[Any], uses: list[KernelUse], size: str, device: str) -> AttentionProof:
    """The proof that kernels, as `prove_call` returns them, are of a call of this size outside a model."""
    return _proof(backend, uses, None, size, device)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The version of each distribution, torch first."""
    return {package: _version(package) for package in dict.fromkeys(["torch", *packages])}


def _version(package: str) -> str:
    if package == "torch":
        return str(torch.__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _proof(
    backend: AttentionBackend[Any], symbols: list[KernelUse], share: float | None, size: str, device: str
) -> AttentionProof:
    return AttentionProof(
        phase=str(backend.phase),
        backend=backend.name,
        variant=backend.name.partition(":")[2] or None,
        symbols=symbols,
        time_share=share,
        step=size,
        versions=versions_of(backend.packages),
        device=device,
    )


def _claimed(claim: Claim, uses: Iterable[KernelUse]) -> list[KernelUse]:
    return [use for use in uses if any(re.search(pattern, use.name) for pattern in claim.must)]


def _families(symbol: str) -> tuple[str, ...]:
    return next((families for pattern, families in SIGNATURES if re.search(pattern, symbol)), ())


def _is_own(backend: str, families: Sequence[str]) -> bool:
    """Whether a backend of this name may launch a kernel of one of these families.

    A library that is named without a variant may launch every variant's; flashinfer's kernels do not tell theirs.
    """
    library = backend.partition(":")[0]
    return any(family in (backend, library) or family.startswith(f"{backend}:") for family in families)


def _own(backend: str, uses: Iterable[KernelUse]) -> bool:
    return any(_is_own(backend, families) for use in uses if (families := _families(use.name)))


def _refuse(backend: AttentionBackend[Any], claim: Claim, problems: Sequence[str], uses: Sequence[KernelUse]) -> None:
    """Raise BackendError if there are problems."""
    if not problems:
        return
    ran = ", ".join(f"{use.name:.100}" for use in uses[:8]) or "nothing"
    claimed = ", ".join(repr(pattern) for pattern in claim.must) or "nothing"
    raise BackendError(
        f"{backend.name} is not what attends in {backend.phase}: {'; '.join(dict.fromkeys(problems))}; "
        f"claimed was {claimed}, the longest that ran were {ran}",
        f"use another --{backend.phase}-attention, or --no-prove-attention to run it unproven",
    )
