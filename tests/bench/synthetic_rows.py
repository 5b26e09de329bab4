"""Rows as benchmarks write them, with figures that a test chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tessera.bench.kernels.ceilings import Measurement, ceiling_records
from tessera.bench.provenance import Machine, Provenance
from tessera.bench.record import CacheState, Conditions, Kind, Record, Status, Subject, Value
from tessera.types import AttentionProof, KernelUse

GPU = Machine("Xeon", 16, 128.0, ["avx512f"], "Linux 6.1 x86_64", "3.11.9", ["NVIDIA H200"], "570.1", "13.0")
LAPTOP = Machine("Laptop CPU", 2, 8.0, ["avx2"], "Linux 6.1 x86_64", "3.11.9")
SYMBOLS = {
    "naive": "aten::bmm",
    "triton": "_paged_decode_kernel",
    "flash_attn:4": "cutlass_flash_fwd_sm90",
    "flashinfer:tensor_cores": "BatchPrefillWithPagedKVCacheKernel",
    "torch_sdpa": "aten::_scaled_dot_product_flash_attention_for_cpu",
}


def where(machine: Machine = GPU, run: str = "r1", commit: str = "abc123def456", command: str = "") -> Provenance:
    versions = {"tessera-llm": "0.4.0", "torch": "2.11.0+cu130"}
    return Provenance(commit, versions, machine, command or "tessera bench offline", run, "2026-11-21T12:00:00+00:00")


def subject(prefill: str, decode: str | None = None, symbols: dict[str, str] | None = None) -> Subject:
    """One of ours, proven."""
    decode = decode or prefill
    names = {"prefill": prefill, "decode": decode}
    seen = SYMBOLS | (symbols or {})
    proofs = [
        AttentionProof(
            phase, name, None, [KernelUse(seen.get(name, name), 4, 9.0)], 0.4, "8 x 512", {"torch": "2.11"}, "H200"
        )
        for phase, name in names.items()
    ]
    label = prefill if prefill == decode else f"{prefill}+{decode}"
    return Subject(label, asked=names, resolved={phase: [name] for phase, name in names.items()}, proofs=proofs)


def row(
    kind: Kind,
    who: Subject,
    case: dict[str, Value],
    metrics: dict[str, float],
    *,
    repeat: int = 0,
    at: Provenance | None = None,
    samples: dict[str, list[float]] | None = None,
    dtype: str = "bfloat16",
    cache: CacheState = "off",
) -> Record:
    conditions = Conditions("SmolLM2-135M", dtype, "cuda", warmup="1 pass", cache=cache)
    at = at or where(command=f"tessera bench {kind} --repeats 5")
    return Record(kind, case, who, "ok", conditions, at, repeat, metrics, samples or {})


def lost(kind: Kind, who: Subject, reason: str, status: Status = "failed", repeat: int = 0) -> Record:
    idle = replace(who, resolved={}, proofs=[])
    at = where(command=f"tessera bench {kind} --repeats 5")
    return Record(kind, {"workload": "rose"}, idle, status, Conditions(), at, repeat, reason=reason)


def offline(
    speeds: dict[str, float] | list[tuple[Subject, float]],
    repeats: int = 5,
    noise: float = 0.01,
    workloads: tuple[str, ...] = ("rose",),
    at: Provenance | None = None,
    seed: int = 0,
) -> list[Record]:
    """Output tok/s of each subject, on a machine that drifts a little for all alike."""
    rng = np.random.default_rng(seed)
    pairs = [(subject(name), speed) for name, speed in speeds.items()] if isinstance(speeds, dict) else speeds
    found = []
    for repeat in range(repeats):
        drift = 1 + 0.01 * repeat
        for workload in workloads:
            for who, speed in pairs:
                rate = speed * drift * float(np.exp(rng.normal(0, noise)))
                metrics = {"output_tok_s": rate, "total_tok_s": 5 * rate, "req_s": rate / 64, "seconds": 8192 / rate}
                metrics |= {"peak_memory_bytes": 2.1e9 + 1e7 * repeat, "latency_ms_p50": 9e5 / rate}
                found.append(row("offline", who, {"workload": workload}, metrics, repeat=repeat, at=at))
    return found


def online(
    paces: list[tuple[Subject, float, float]], repeats: int = 5, scales: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
) -> list[Record]:
    """Median TTFT and TPOT in ms of each subject; a smaller scale is a heavier load."""
    rng = np.random.default_rng(1)
    found = []
    for repeat in range(repeats):
        for scale in scales:
            for who, ttft, tpot in paces:
                base = {"ttft": ttft, "tpot": tpot, "itl": 0.97 * tpot, "e2e": ttft + 64 * tpot}
                metrics = {"req_s": 4 / scale, "output_tok_s": 260 / scale, "client_cpu": 0.2, "client_lag_ms": 0.3}
                for name, value in base.items():
                    for part, factor in (("p50", 1.0), ("p90", 1.2 + 0.2 / scale), ("p99", 1.4 + 0.6 / scale)):
                        pushed = value * factor * (1 + 0.1 / scale) * float(np.exp(rng.normal(0, 0.01)))
                        metrics[f"{name}_ms_{part}"] = pushed
                found.append(row("online", who, {"trace": "mooncake", "scale": scale}, metrics, repeat=repeat))
    return found


def kernels(factors: dict[str, float], shapes: tuple[str, ...] = ("8q1s512", "8q1s2048", "64q1s2048")) -> list[Record]:
    """Times of each backend, decode and prefill, in one run; ceilings of the machine."""
    rng = np.random.default_rng(2)
    found = []
    for phase in ("prefill", "decode"):
        for number, workload in enumerate(shapes):
            for name, factor in factors.items():
                ms = 0.05 * 3**number * factor
                times = (ms * np.exp(rng.normal(0, 0.01, 30))).tolist()
                flop = (480 if phase == "prefill" else 20) / factor
                metrics = {"ms_median": float(np.median(times)), "ms_mean": ms, "ms_std": 0.01 * ms, "tflop_s": flop}
                metrics |= {
                    "tb_s": 3.2 / factor / (4 if phase == "prefill" else 1) * (1 + number) / 3,
                    "ceiling_share": 0.8 / factor,
                }
                case: dict[str, Value] = {
                    "phase": phase,
                    "workload": workload,
                    "heads": "32/8/128",
                    "dtype": "bfloat16",
                }
                found.append(row("kernels", subject(name), case, metrics, samples={"ms": times}))
    return [*found, *ceilings(found[0].provenance)]


def ceilings(at: Provenance, device: str = "cuda") -> list[Record]:
    """4.1 TB/s, 720 TFLOP/s in bfloat16 and 36 in float32."""
    measured = [
        Measurement("read", "float32", 4.1e9, [1.0]),
        Measurement("gemm", "bfloat16", 7.2e11, [1.0, 1.3]),
        Measurement("gemm", "float32", 3.6e10, [1.0]),
    ]
    return list(ceiling_records(measured, device, at))


def api(speeds: dict[str, float], repeats: int = 5) -> list[Record]:
    rng = np.random.default_rng(3)
    found = []
    for repeat in range(repeats):
        for tokens in (45, 2800):
            for concurrency in (1, 2, 4, 8, 16):
                for name, speed in speeds.items():
                    rate = speed * concurrency**0.8 * float(np.exp(rng.normal(0, 0.01)))
                    metrics = {"generation_tok_s": rate, "prompt_tok_s": rate * tokens / 512, "network_ms": 0.4}
                    metrics |= {
                        "ttft_ms_min": 20.0 * tokens / speed,
                        "ttft_ms_max": 30.0 * tokens * concurrency / speed,
                    }
                    case: dict[str, Value] = {"input_tokens": tokens, "concurrency": concurrency}
                    found.append(row("api", subject(name), case, metrics, repeat=repeat))
    return found


def ttft(repeats: int = 3) -> list[Record]:
    bars = {"network": 0.5, "naive": 61.0, "triton": 33.0, "prefix cache": 9.0}
    found = []
    for repeat in range(repeats):
        for tokens in (128, 1024):
            for name, ms in bars.items():
                who = replace(subject("naive" if name == "naive" else "triton"), label=name)
                if name == "network":
                    who = Subject(name, engine="none", note="nothing is computed")
                value = ms * (1 if name == "network" else tokens / 128) * (1 + 0.01 * repeat)
                case: dict[str, Value] = {"model": "SmolLM2-135M", "prompt_tokens": tokens}
                found.append(row("ttft", who, case, {"ttft_ms": value}, repeat=repeat, cache="cold"))
    return found


def quality(
    kl: dict[str, float], agreement: dict[str, float] | None = None, score: dict[str, float] | None = None
) -> list[Record]:
    found = []
    for name, value in kl.items():
        metrics = {"kl_mean": value, "kl_max": 20 * value, "max_logit_error": 0.05, "perplexity": 21.4}
        metrics |= {"greedy_agreement_led": (agreement or {}).get(name, 0.99), "equal_answers": 0.9}
        metrics |= {"lm_eval_piqa_acc": (score or {}).get(name, 0.681), "lm_eval_piqa_acc_stderr": 0.011}
        case: dict[str, Value] = {"text": "book", "dtype": "bfloat16", "prompts": 8, "tokens": 32}
        found.append(row("quality", subject(name), case, metrics))
    return found


def everything() -> list[Record]:
    """A whole comparison on one machine: fused prefill helps offline and the first token, decode is the same."""
    decode = "flashinfer:tensor_cores"
    naive, flash = subject("naive", decode), subject("flash_attn:4", decode)
    rows = offline(
        [(naive, 3100), (flash, 4185), (subject("triton"), 4170), (subject("torch_sdpa"), 3300)],
        workloads=("rose", "long"),
    )
    rows += online([(naive, 160, 11), (flash, 95, 11), (subject("triton"), 98, 12)])
    rows += kernels({"naive": 4.0, "flash_attn:4": 1.0, "triton": 1.15, "torch_sdpa": 1.6})
    rows += api({"naive": 60.0, "triton": 80.0}) + ttft()
    rows += quality({"naive": 2e-4, "flash_attn:4": 2.4e-4, "triton": 2.2e-4})
    rows += [
        lost("offline", subject("flash_attn:3"), "flash_attn:3 needs compute capability 9.0", "unavailable", i)
        for i in range(5)
    ]
    rows.append(lost("online", subject("flex"), "the server ended with code 1 while it compiled: out of memory"))
    vllm = Subject("vllm", engine="vllm", note="another engine")
    return rows + [
        row("offline", vllm, {"workload": "rose"}, {"output_tok_s": 5000.0 + 40 * i, "total_tok_s": 25000.0}, repeat=i)
        for i in range(5)
    ]
