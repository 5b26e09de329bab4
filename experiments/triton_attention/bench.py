"""Check and time every attention kernel on a GPU: OUT=folder python bench.py [--budget seconds].

The parent compiles all variants in parallel (into Triton's cache), then runs each section in a process of its
own, so that a variant that breaks the device costs that variant only: the section starts again without it.
Rows are appended to $OUT/SECTION.jsonl as they come; $OUT/results.json holds everything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = Path(os.environ.get("OUT", HERE / "out"))
os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/tessera-triton-cache")

import torch  # noqa: E402
from cases import (  # noqa: E402
    DECODE_CASES,
    PACKED_CASES,
    PACKED_CONFIGS,
    PAGED_CONFIGS,
    PREFILL_CASES,
    DecodeCase,
    PrefillCase,
    decode_configs,
    split_choices,
)  # fmt: skip
from decode import DecodeConfig, PagedDecode  # noqa: E402
from prefill import PrefillConfig, packed_attention, paged_prefill  # noqa: E402
from reference import PagedInputs, dense, dense_paged, paged_inputs, prefix_sums, relative_error  # noqa: E402
from timing import ceilings, graph_times_us  # noqa: E402

LIMIT = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
SECTIONS = ("conform", "decode", "prefill", "packed")
SHARES = {"conform": 0.12, "decode": 0.5, "prefill": 0.22, "packed": 0.16}
COLD_BYTES = 400 << 20
Row = dict[str, Any]
Job = tuple[str, Callable[[], Row]]


# ---------------------------------------------------------------- checks


def check_decode(
    config: DecodeConfig,
    heads: tuple[int, int],
    head_dim: int,
    page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> Row:
    """Error on ragged lengths, eagerly and then as a graph whose lengths change between replays."""
    torch.manual_seed(1)
    longest = 1500
    decode = PagedDecode(*heads, head_dim, head_dim**-0.5, page_size, 7, longest, num_sms(), "cuda", config)
    x = paged_inputs([1] * 7, [longest] * 7, heads, head_dim, page_size, dtype, "cuda")
    out = torch.empty_like(x.q)

    def step() -> None:
        decode.plan(x.kv_lens)
        decode.run(x.q, x.k_pages, x.v_pages, x.page_table, x.kv_lens, out)

    run, worst, graph = step, (0.0, 0.0), torch.cuda.CUDAGraph()
    for kv_lens in ([longest] * 7, [1, 0, 17, 1024, 640, 1499, 300], [5, 1500, 64, 128, 999, 16, 33]):
        x.kv_lens.copy_(torch.tensor(kv_lens))
        out.fill_(float("nan"))
        run()
        worst = max(worst, relative_error(out, dense_paged(x, head_dim**-0.5)))
        if run == step:
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
    clean = not bool(decode.arrivals.any())
    return verdict(worst, dtype, clean)


def check_prefill(
    config: PrefillConfig, heads: tuple[int, int], head_dim: int, page_size: int, dtype: torch.dtype = torch.bfloat16
) -> Row:
    """Error on ragged lengths, with and without tokens already in the cache."""
    torch.manual_seed(2)
    q_lens, kv_lens = [300, 1, 129, 64, 513], [300, 700, 1000, 65, 513]
    x = paged_inputs(q_lens, kv_lens, heads, head_dim, page_size, dtype, "cuda")
    out = torch.full_like(x.q, float("nan"))
    paged_prefill(
        x.q, x.k_pages, x.v_pages, x.page_table, x.cu_q_lens, x.kv_lens, max(q_lens), head_dim**-0.5, out, config
    )
    return verdict(relative_error(out, dense_paged(x, head_dim**-0.5)), dtype)


def check_packed(
    config: PrefillConfig, heads: tuple[int, int], head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> Row:
    """Error on ragged segments of a fused projection."""
    torch.manual_seed(3)
    lens = [300, 64, 1, 1000]
    fused = torch.randn(sum(lens), heads[0] + 2 * heads[1], head_dim, device="cuda").to(dtype)
    q, k, v = fused.split([heads[0], heads[1], heads[1]], 1)
    out = torch.full((sum(lens), heads[0], head_dim), float("nan"), dtype=dtype, device="cuda")
    packed_attention(q, k, v, prefix_sums(lens, "cuda"), max(lens), head_dim**-0.5, out, config)
    bounds = [sum(lens[:i]) for i in range(len(lens))]
    parts = [
        dense(*(t[a : a + n] for t in (q, k, v)), head_dim**-0.5, False) for a, n in zip(bounds, lens, strict=True)
    ]
    return verdict(relative_error(out, torch.cat(parts)), dtype)


def verdict(error: tuple[float, float], dtype: torch.dtype, clean: bool = True) -> Row:
    """Errors as a row, and whether they are within the limit (NaN is not)."""
    return {"max_error": error[0], "rel_error": error[1], "good": bool(error[1] < LIMIT[dtype]) and clean}


def num_sms() -> int:
    """Multiprocessors of the device."""
    return int(torch.cuda.get_device_properties(0).multi_processor_count)


# ---------------------------------------------------------------- decode


class DecodeTimer:
    """One case's inputs: several page tables over one pool, so that every call finds a cold L2."""

    def __init__(self, case: DecodeCase) -> None:
        torch.manual_seed(0)
        self.case, seqs = case, len(case.kv_lens)
        self.copies = max(1, min(64, -(-COLD_BYTES // case.kv_bytes)))
        many = paged_inputs(
            [1] * seqs * self.copies, list(case.kv_lens) * self.copies, case.heads, case.head_dim, 16,
            torch.bfloat16, "cuda", num_pages=1,
        )  # fmt: skip
        width = -(-many.page_table.shape[1] // 16) * 16
        table = torch.zeros(self.copies * seqs, width, dtype=torch.int32, device="cuda")
        table[:, : many.page_table.shape[1]] = many.page_table
        self.inputs = [
            PagedInputs(
                many.q[i * seqs : (i + 1) * seqs].clone(), many.k_pages, many.v_pages,
                table[i * seqs : (i + 1) * seqs].clone(), many.cu_q_lens[: seqs + 1], many.kv_lens[:seqs].clone(),
            )
            for i in range(self.copies)
        ]  # fmt: skip
        few, x = min(seqs, 4), self.inputs[0]
        self.few = few
        self.expected = dense_paged(
            PagedInputs(x.q[:few], x.k_pages, x.v_pages, x.page_table[:few], x.cu_q_lens[: few + 1], x.kv_lens[:few]),
            case.head_dim**-0.5,
        )

    def time(self, config: DecodeConfig) -> Row:
        """Check the first sequences, then time one layer's attention (the plan runs once a step and is not timed)."""
        case = self.case
        decode = PagedDecode(
            *case.heads,
            case.head_dim,
            case.head_dim**-0.5,
            16,
            len(case.kv_lens),
            max(case.kv_lens),
            num_sms(),
            "cuda",
            config,
        )
        outs = [torch.full_like(x.q, float("nan")) for x in self.inputs]
        decode.plan(self.inputs[0].kv_lens)

        def call(i: int) -> None:
            x = self.inputs[i]
            decode.run(x.q, x.k_pages, x.v_pages, x.page_table, x.kv_lens, outs[i])

        call(0)
        row = verdict(relative_error(outs[0][: self.few], self.expected), torch.bfloat16)
        grid = decode.workers if config.balanced else decode.num_splits
        row |= {"num_splits": grid, "copies": self.copies}
        if row["good"] and bool(outs[0].isfinite().all()):
            row |= graph_times_us([lambda i=i: call(i) for i in range(self.copies)])
            row["tbs"] = case.kv_bytes / row["us"] / 1e6
        return row


def decode_jobs() -> Iterator[Job]:
    """Check each compiled variant on each shape, then time it with each grid, the likeliest variants first."""
    timers: dict[str, DecodeTimer] = {}
    shapes = list(dict.fromkeys((case.heads, case.head_dim) for case in DECODE_CASES))
    most = max(len(decode_configs(*shape)) for shape in shapes)
    for rank in range(most):
        for heads, head_dim in shapes:
            configs = decode_configs(heads, head_dim)
            if rank >= len(configs):
                continue
            config = configs[rank]
            yield (
                f"check {heads} {head_dim} | {config.name()}",
                lambda c=config, h=heads, d=head_dim: check_decode(c, h, d),
            )
            for case in (c for c in DECODE_CASES if (c.heads, c.head_dim) == (heads, head_dim)):
                for choice in split_choices(config):
                    yield f"{case.name} | {choice.name()}", lambda c=case, x=choice: timed_decode(timers, c, x)


def timed_decode(timers: dict[str, DecodeTimer], case: DecodeCase, config: DecodeConfig) -> Row:
    """Time one configuration, with inputs made at the case's first use."""
    if case.name not in timers:
        timers[case.name] = DecodeTimer(case)
    return {"case": case.name, "config": config.name()} | timers[case.name].time(config)


# ---------------------------------------------------------------- prefill and packed


def timed_prefill(case: PrefillCase, config: PrefillConfig, page_size: int) -> Row:
    """Check nothing (check_prefill does), time the kernel over three copies of the inputs."""
    torch.manual_seed(0)
    shape = ([case.q_len] * case.num_seqs, [case.kv_len] * case.num_seqs, case.heads, case.head_dim, page_size)
    inputs = [paged_inputs(*shape, torch.bfloat16, "cuda", num_pages=1) for _ in range(3)]
    out = torch.empty_like(inputs[0].q)

    def call(x: PagedInputs) -> None:
        paged_prefill(
            x.q,
            x.k_pages,
            x.v_pages,
            x.page_table,
            x.cu_q_lens,
            x.kv_lens,
            case.q_len,
            case.head_dim**-0.5,
            out,
            config,
        )

    row = graph_times_us([lambda x=x: call(x) for x in inputs])
    name = f"{config.name()} page {page_size}"
    return {"case": case.name, "config": name, "good": True, "tflops": case.flops / row["us"] / 1e6} | row


def timed_packed(case: PrefillCase, config: PrefillConfig) -> Row:
    """Time the kernel over three copies of the inputs."""
    torch.manual_seed(0)
    tokens = case.num_seqs * case.q_len
    inputs = [
        [
            torch.randn(tokens, n, case.head_dim, device="cuda").bfloat16()
            for n in (case.heads[0], case.heads[1], case.heads[1])
        ]
        for _ in range(3)
    ]
    cu_lens, out = prefix_sums([case.q_len] * case.num_seqs, "cuda"), torch.empty_like(inputs[0][0])

    def call(x: list[torch.Tensor]) -> None:
        packed_attention(*x, cu_lens, case.q_len, case.head_dim**-0.5, out, config)

    row = graph_times_us([lambda x=x: call(x) for x in inputs])
    return {"case": case.name, "config": config.name(), "good": True, "tflops": case.flops / row["us"] / 1e6} | row


def timed_peer(case: PrefillCase, backend: str) -> Row:
    """Time torch SDPA with one backend on contiguous keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    lens = (case.q_len, case.kv_len, case.kv_len)
    heads = (case.heads[0], case.heads[1], case.heads[1])
    inputs = [
        [
            torch.randn(case.num_seqs, n, h, case.head_dim, device="cuda").bfloat16().transpose(1, 2)
            for n, h in zip(lens, heads, strict=True)
        ]
        for _ in range(3)
    ]

    def call(x: list[torch.Tensor]) -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            torch.nn.functional.scaled_dot_product_attention(
                *x, is_causal=case.causal, enable_gqa=case.heads[0] != case.heads[1]
            )

    row = graph_times_us([lambda x=x: call(x) for x in inputs])
    return {
        "case": case.name,
        "config": backend,
        "peer": True,
        "good": True,
        "tflops": case.flops / row["us"] / 1e6,
    } | row


def prefill_jobs() -> Iterator[Job]:
    """Peers first, then each configuration checked and timed."""
    yield from peer_jobs(PREFILL_CASES)
    for config in PAGED_CONFIGS:
        for head_dim, heads in ((128, (32, 8)), (64, (9, 3))):
            for page_size in (128,) if config.tma else (16, 128) if config is PAGED_CONFIGS[0] else (16,):
                label = f"{head_dim} {config.name()} page {page_size}"
                yield (
                    f"check prefill {label}",
                    lambda c=config, h=heads, d=head_dim, p=page_size: check_prefill(c, h, d, p),
                )
                for case in (c for c in PREFILL_CASES if c.head_dim == head_dim):
                    yield f"{case.name} | {label}", lambda c=case, x=config, p=page_size: timed_prefill(c, x, p)


def packed_jobs() -> Iterator[Job]:
    """Peers first, then each configuration checked and timed."""
    yield from peer_jobs(PACKED_CASES)
    for config in PACKED_CONFIGS:
        for head_dim in (64, 72, 80):
            if head_dim == 64 and not config.cut_head:
                continue
            label = f"{head_dim} {config.name()}"
            yield f"check packed {label}", lambda c=config, d=head_dim: check_packed(c, (16, 16), d)
            for case in (c for c in PACKED_CASES if c.head_dim == head_dim):
                yield f"{case.name} | {label}", lambda c=case, x=config: timed_packed(c, x)


def peer_jobs(cases: tuple[PrefillCase, ...]) -> Iterator[Job]:
    """torch SDPA on every case whose mask it has (its causal mask is aligned to the first key)."""
    for case in cases:
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            if not case.causal or case.q_len == case.kv_len:
                yield f"{case.name} | {backend}", lambda c=case, b=backend: timed_peer(c, b)


def conform_jobs() -> Iterator[Job]:
    """Ceilings of the device, then types, page sizes and head dims that are checked and not timed."""
    yield "ceilings", lambda: {"good": True, **ceilings()}
    split, balanced = DecodeConfig(num_stages=5), DecodeConfig(num_stages=5, balanced=True)
    half, full = torch.float16, torch.float32
    decodes: list[tuple[DecodeConfig, tuple[int, int], int, int, torch.dtype]] = [
        (split, (32, 8), 128, 16, half), (DecodeConfig(block_n=32, num_stages=3), (9, 3), 64, 16, full),
        (balanced, (9, 3), 64, 16, half), (split, (9, 3), 64, 1, torch.bfloat16), (split, (32, 8), 128, 256, torch.bfloat16),
        (split, (4, 4), 80, 16, torch.bfloat16), (split, (64, 1), 128, 32, torch.bfloat16),
        (DecodeConfig(dot="cores", block_n=16), (3, 3), 96, 64, half),
    ]  # fmt: skip
    for args in decodes:
        yield f"decode {args[1:]} {args[0].name()}", lambda a=args: check_decode(*a)
    for config, heads, dim, page, dtype in (
        (PrefillConfig(128, 64, 8, 3), (8, 2), 128, 16, half), (PrefillConfig(64, 32, 4, 2), (6, 2), 64, 16, full),
        (PrefillConfig(64, 64, 4, 3), (4, 4), 80, 1, torch.bfloat16), (PrefillConfig(128, 64, 8, 3), (4, 1), 96, 32, half),
        (PrefillConfig(64, 64, 4, 3), (2, 2), 256, 16, torch.bfloat16),
    ):  # fmt: skip
        label = f"prefill {heads} {dim} page {page} {dtype} {config.name()}"
        yield label, lambda c=config, h=heads, d=dim, p=page, t=dtype: check_prefill(c, h, d, p, t)
    for dim, dtype in ((72, half), (80, full)):
        config = PrefillConfig(64, 32, 4, 2)
        yield f"packed {dim} {dtype} {config.name()}", lambda c=config, d=dim, t=dtype: check_packed(c, (4, 2), d, t)


JOBS: dict[str, Callable[[], Iterator[Job]]] = {
    "conform": conform_jobs, "decode": decode_jobs, "prefill": prefill_jobs, "packed": packed_jobs,
}  # fmt: skip


# ---------------------------------------------------------------- running


def read_rows(section: str) -> list[Row]:
    """Rows that a section has written so far."""
    path = OUT / f"{section}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def device_lives() -> bool:
    """Whether the device still answers; after an illegal access it never does in that process."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception:
        return False
    return True


def run_section(section: str, deadline: float) -> int:
    """Run a section's jobs that have no row yet; 3 where a job broke the device."""
    done = {row["job"] for row in read_rows(section)}
    wrong: set[str] = {
        row["job"] for row in read_rows(section) if row["job"].startswith("check") and not row.get("good")
    }
    with (OUT / f"{section}.jsonl").open("a") as file:
        for job, work in JOBS[section]():
            if job in done:
                continue
            if time.time() > deadline:
                print(f"{section}: out of time before {job}", flush=True)
                break
            row = run_job(job, work)
            file.write(json.dumps({"job": job, **row}) + "\n")
            file.flush()
            if not row.get("good"):
                wrong.add(job)
                print(f"{section}: {job}: {row.get('error') or row}", flush=True)
            if not device_lives():
                return 3
    print(f"{section}: {len(wrong)} jobs failed", flush=True)
    return 0


def run_job(job: str, work: Callable[[], Row]) -> Row:
    """A job's row; an error becomes one."""
    try:
        return work()
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        return {"good": False, "error": f"{type(error).__name__}: {error}"[:400], "trace": lines[-6:]}


def compile_jobs() -> list[Job]:
    """Every job that is a check: running one compiles its kernels with the very arguments that are timed later."""
    names = ("check", "decode (", "prefill (", "packed ")
    return [job for section in SECTIONS for job in JOBS[section]() if job[0].startswith(names)]


def warm(part: int, parts: int) -> None:
    """Run every parts-th check, results unread."""
    for job, work in compile_jobs()[part::parts]:
        run_job(job, work)
        if not device_lives():
            return


def run_parent(budget: float) -> None:
    """Compile in parallel, run the sections, write results.json, print the table."""
    began = time.time()
    OUT.mkdir(parents=True, exist_ok=True)
    parts = max(1, min(12, (os.cpu_count() or 2) - 2))
    script = [sys.executable, str(Path(__file__).resolve())]
    helpers = [subprocess.Popen([*script, "--warm", f"{i}/{parts}"], stderr=subprocess.DEVNULL) for i in range(parts)]
    finish_all(helpers, began + budget * 0.35)
    print(f"compiled in {time.time() - began:.0f} s", flush=True)
    left = began + budget - time.time()
    for section in SECTIONS:
        deadline = time.time() + left * SHARES[section]
        for _ in range(4):
            run = subprocess.Popen([*script, "--section", section, "--deadline", str(deadline)])
            finish_all([run], deadline + 20)
            if run.returncode == 0 or time.time() > deadline:
                break
    results = {"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "seconds": time.time() - began}
    rows = {section: read_rows(section) for section in SECTIONS}
    (OUT / "results.json").write_text(json.dumps({**results, **rows}))
    print_table(rows)
    print(f"{results['device']}, torch {results['torch']}, {results['seconds']:.0f} s in all")


def finish_all(processes: list[subprocess.Popen[bytes]], deadline: float) -> None:
    """Wait for processes that this script started; end those that are late."""
    for process in processes:
        try:
            process.wait(max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def print_table(rows: dict[str, list[Row]]) -> None:
    """Per case: our best, the runner-up of another variant, the peer's figure, the prediction."""
    checks = [row for section in rows.values() for row in section if "rel_error" in row or "error" in row]
    bad = [row for row in checks if not row.get("good")]
    print(f"\n{len(checks) - len(bad)} checks good, {len(bad)} bad" + "".join(f"\n  BAD {r['job']}" for r in bad[:12]))
    for row in rows["conform"]:
        if row["job"] == "ceilings":
            print({k: round(v, 2) for k, v in row.items() if isinstance(v, float)})
    for section, cases in (("decode", DECODE_CASES), ("prefill", PREFILL_CASES), ("packed", PACKED_CASES)):
        for case in cases:
            timed = sorted(
                (r for r in rows[section] if r.get("case") == case.name and "us" in r), key=lambda r: r["us"]
            )
            print_case(case, [r for r in timed if not r.get("peer")], [r for r in timed if r.get("peer")])


def print_case(case: DecodeCase | PrefillCase, ours: list[Row], peers: list[Row]) -> None:
    """One case's lines: the fastest grid of each of the three best variants, then same-run peers."""
    peer = f"{case.peer_us:.1f}" if case.peer_us else "-"
    print(f"{case.name}: predicted {case.predicted_us:.0f}, best peer before {peer} us")
    seen: set[str] = set()
    for row in ours:
        variant = row["config"].split(" auto")[0].split(" s6")[0]
        if variant not in seen and len(seen) < 4:
            seen.add(variant)
            rate = f"{row['tbs']:.2f} TB/s" if "tbs" in row else f"{row['tflops']:.0f} TFLOP/s"
            grid = f" grid {row['num_splits']}" if "num_splits" in row else ""
            print(f"    {row['us']:8.1f} us {rate:13} {row['config']}{grid}")
    for row in peers:
        print(f"    {row['us']:8.1f} us {row['tflops']:.0f} TFLOP/s  peer {row['config']}")


def main() -> int:
    """Parent, compiler or section, by arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all")
    parser.add_argument("--warm", help="internal: PART/PARTS of the checks, to fill Triton's cache")
    parser.add_argument("--section", choices=SECTIONS, help="internal: run one section")
    parser.add_argument("--deadline", type=float, default=float("inf"))
    options = parser.parse_args()
    if options.warm:
        part, parts = options.warm.split("/")
        warm(int(part), int(parts))
        return 0
    if options.section:
        return run_section(options.section, options.deadline)
    run_parent(options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
