"""The last part of the conformance kit: a tiny random model, greedy, through the whole engine.

Chunked prompts, shared prefixes, steps that mix phases: the tokens must be those that naive attention gives.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tessera.attention.contract import AttentionBackend, Phase, Shape
from tessera.attention.verify import Check, Outcome, base_shape, dtype_name
from tessera.attention.workloads import TOLERANCE
from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.engine import Engine
from tessera.log import logger
from tessera.types import Request, SamplingParams

REFERENCE = "naive"
VOCAB_SIZE, MAX_LEN, NUM_LAYERS, WINDOW, NUM_TOKENS = 128, 256, 3, 24, 16
PROMPT_LENS = (1, 5, 17, 64, 65, 100, 33, 40)
STEP_TOKENS = 48
"""Most tokens a step: longer prompts come in chunks, beside sequences that decode."""
AGREEMENT = {torch.float32: 1.0, torch.bfloat16: 0.4, torch.float16: 0.6}
"""Least share of tokens before the first that differs. Rounding decides between near ties of a random model, and
one other token changes all after it."""


def engine_checks(
    name: str,
    backend: type[AttentionBackend[Any]],
    phases: Sequence[Phase] | None,
    dtypes: Sequence[torch.dtype] | None,
    device_type: str,
) -> Iterator[Check]:
    """One check a dtype, and one more with a sliding window where that is claimed.

    The backend, registered as `name`, serves those of PREFILL and DECODE that it claims; naive attention the
    other. Nothing is yielded where it claims neither.
    """
    claimed = [phase for phase in (Phase.PREFILL, Phase.DECODE) if phase in backend.limits]
    served = [phase for phase in claimed if phases is None or phase in phases]
    for dtype in TOLERANCE if dtypes is None else dtypes:
        usable = [phase for phase in served if _is_usable(backend, phase, dtype, device_type)]
        if not usable:
            continue
        shapes = {phase: base_shape(backend, phase, dtype, device_type) for phase in usable}
        refused = any(backend.reasons_against(phase, replace(shape, window=WINDOW)) for phase, shape in shapes.items())
        for window in [None] if refused else [None, WINDOW]:
            yield _check(name, backend, usable, dtype, device_type, window)


def _is_usable(backend: type[AttentionBackend[Any]], phase: Phase, dtype: torch.dtype, device_type: str) -> bool:
    try:
        return not backend.reasons_against(phase, base_shape(backend, phase, dtype, device_type))
    except Exception:  # a failed check already
        return False


def _check(
    name: str,
    backend: type[AttentionBackend[Any]],
    phases: Sequence[Phase],
    dtype: torch.dtype,
    device_type: str,
    window: int | None,
) -> Check:
    started = time.perf_counter()
    claimed = f"{name} claims to serve {'+'.join(phases)} of {dtype_name(dtype)} in an engine"
    try:
        agreement = _agreement(name, phases, base_shape(backend, phases[0], dtype, device_type), window)
        detail = "" if agreement >= AGREEMENT[dtype] else f"{claimed}, but {_differs(agreement, dtype, window)}"
    except Exception as error:  # a backend may raise anything: that is a claim not kept
        raised = " ".join(str(error).split())[:300]
        detail = f"{claimed}, but {type(error).__name__} was raised: {raised}"
    outcome: Outcome = "fail" if detail else "pass"
    label = "greedy_tokens" if window is None else "greedy_tokens_with_window"
    seconds = time.perf_counter() - started
    return Check("+".join(phases), dtype_name(dtype), "engine", label, outcome, detail, seconds)


def _agreement(name: str, phases: Sequence[Phase], shape: Shape, window: int | None) -> float:
    """The share of greedy tokens that come before the first that differs from the reference's."""
    with tempfile.TemporaryDirectory(prefix="tessera-verify-") as folder:
        write_model(Path(folder), shape, window)
        page_size, tokens = _generate(folder, shape, dict.fromkeys(phases, name), None)
        _, expected = _generate(folder, shape, {}, page_size)
    return sum(_num_equal(a, b) for a, b in zip(tokens, expected)) / sum(map(len, expected))


def _differs(agreement: float, dtype: torch.dtype, window: int | None) -> str:
    return (
        f"{agreement:.0%} of the greedy tokens of a tiny model{f' with a window of {window}' if window else ''} come "
        f"before the first that differs from {REFERENCE}'s, {AGREEMENT[dtype]:.0%} at least must"
    )


def write_model(folder: Path, shape: Shape, window: int | None) -> None:
    """A tiny random Llama, or with a window Mistral, with the heads of `shape`; weights large enough to matter."""
    hidden, q, kv = 16 * shape.num_q_heads, shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    config = {
        "model_type": "mistral" if window else "llama",
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": MAX_LEN,
        "eos_token_id": 0,
        "bos_token_id": 1,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    } | ({"sliding_window": window} if window else {})
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {"model.embed_tokens": (VOCAB_SIZE, hidden), "lm_head": (VOCAB_SIZE, hidden)}
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}"
        sizes |= {f"{at}.self_attn.{x}_proj": (n, hidden) for x, n in (("q", q), ("k", kv), ("v", kv))}
        sizes |= {f"{at}.self_attn.o_proj": (hidden, q), f"{at}.mlp.down_proj": (hidden, 2 * hidden)}
        sizes |= {f"{at}.mlp.{x}_proj": (2 * hidden, hidden) for x in ("gate", "up")}
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"{name}.weight": torch.randn(size, generator=generator) / size[1] ** 0.5 for name, size in sizes.items()
    }
    norms = [f"model.layers.{i}.{x}_layernorm" for i in range(NUM_LAYERS) for x in ("input", "post_attention")]
    weights |= {f"{name}.weight": torch.ones(hidden) for name in (*norms, "model.norm")}
    for name in weights:
        if "q_proj" in name or "k_proj" in name:
            weights[name] *= 1.5  # attention that picks, in place of one that averages
    save_file(weights, folder / "model.safetensors")


def _generate(folder: str, shape: Shape, names: dict[Phase, str], page_size: int | None) -> tuple[int, list[list[int]]]:
    """The page size that was chosen, and the greedy tokens of each prompt, with these backends and naive ones."""
    config = EngineConfig.from_flat(
        {
            "model": folder,
            "dtype": dtype_name(shape.dtype),
            "device": shape.device_type,
            "page_size": page_size,
            "num_pages": 200,
            "max_num_seqs": 6,
            "max_num_batched_tokens": STEP_TOKENS,
            "attention": REFERENCE,
            "prefill_attention": names.get(Phase.PREFILL, REFERENCE),
            "decode_attention": names.get(Phase.DECODE, REFERENCE),
        }
    )
    engine = _build_quietly(config)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    common = torch.randint(2, VOCAB_SIZE, (max(PROMPT_LENS),), generator=torch.Generator().manual_seed(1)).tolist()
    for number, length in enumerate(PROMPT_LENS):
        prompt = [*common[: length - 1], 2 + number]  # long ones begin alike: their pages are shared
        engine.add(Request(str(number), prompt, params))
    tokens: list[list[int]] = [[] for _ in PROMPT_LENS]
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    return engine.info.page_size, tokens


def _build_quietly(config: EngineConfig) -> Engine:
    """An engine whose loading warns of nothing: that half types are slow on a CPU is beside the point here."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return build_engine(config)
    finally:
        logger.setLevel(level)


def _num_equal(tokens: list[int], expected: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), min(len(tokens), len(expected)))
