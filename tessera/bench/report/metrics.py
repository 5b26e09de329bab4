"""What a metric's name says: which way is better, how it is called and how its values are written."""

from __future__ import annotations

import re

HEADLINES = {
    "offline": ("output_tok_s",),
    "online": ("ttft_ms_p50", "tpot_ms_p50", "itl_ms_p50", "e2e_ms_p50"),
    "api": ("generation_tok_s", "ttft_ms_max"),
    "ttft": ("ttft_ms",),
    "kernels": ("ms_median",),
}
"""Metrics that the verdict speaks of, the first one first."""

HIGHER = (
    r"(_|^)(tok|req|tb|gb|tflop)_s(_|$)|(_|^)ceiling_share$|(_|^)goodput|^equal_(tokens|answers)|^greedy_agreement|"
    r"[ _](acc|acc_norm|exact_match|f1|em|bleu|mcc)(,[\w-]+)?$"
)
LOWER = (
    r"(_|^)ms(_(mean|median|p\d+|min|max))?$|(_|^)seconds$|(_|^)memory_bytes$|^kl_|^max_logit_error$|"
    r"([ _]|^)(perplexity|word_perplexity|byte_perplexity|bits_per_byte)(,\w+)?$|^(max|rms)_error$"
)
UNJUDGED = r"^client_|^network_|^warmup_|([ _]|^)(std|stderr)$|^plan_ms$|_launch_ms$|_graph_ms"
"""Spreads, and what belongs to the measuring and not to the measured."""

_NAMES = {
    "output_tok_s": "output tok/s",
    "total_tok_s": "total tok/s",
    "generation_tok_s": "generation tok/s",
    "prompt_tok_s": "prompt tok/s",
    "tok_s": "tok/s",
    "req_s": "requests/s",
    "tflop_s": "TFLOP/s",
    "tb_s": "TB/s",
    "seconds": "seconds",
    "peak_memory_bytes": "peak memory",
    "gpu_memory_bytes": "GPU memory",
    "ceiling_share": "share of ceiling",
    "kl_mean": "KL mean",
    "kl_max": "KL max",
    "max_logit_error": "max logit error",
    "greedy_agreement_led": "equal tokens, led",
    "greedy_agreement_free": "equal tokens, free",
    "equal_answers": "equal answers",
    "goodput_share": "goodput share",
    "goodput_req_s": "goodput req/s",
}


def higher_is_better(metric: str) -> bool | None:
    """None where the name does not say: such a metric is shown and never judged."""
    if re.search(UNJUDGED, metric):
        return None
    if re.search(HIGHER, metric):
        return True
    return False if re.search(LOWER, metric) else None


def title(metric: str) -> str:
    """As in a table's head: `TTFT p90 (ms)`."""
    if metric in _NAMES:
        return _NAMES[metric]
    if found := re.fullmatch(r"(ttft|tpot|itl|e2e)_ms(?:_(\w+))?", metric):
        return f"{found[1].upper()} {found[2] or ''}".strip() + " (ms)"
    if found := re.fullmatch(r"(?:(\w+?)_)?ms(?:_(\w+))?", metric):
        return " ".join(part.replace("_", " ") for part in (found[1], found[2]) if part) + " (ms)"
    for ending, unit in (("_tflop_s", "TFLOP/s"), ("_tb_s", "TB/s"), ("_tok_s", "tok/s"), ("_req_s", "requests/s")):
        if metric.endswith(ending):
            return f"{metric.removesuffix(ending).replace('_', ' ')} {unit}"
    return metric.replace("_", " ")


def number(metric: str, value: float) -> str:
    """Three or four digits that mean something; bytes in MiB or GiB, shares in per cent."""
    if metric.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if metric.endswith("_share"):
        return f"{value:.1%}"
    return digits(value)


def digits(value: float) -> str:
    """`12,345`, `123.4`, `12.34`, `0.00123`, `1.2e-07`."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.4g}"
    return "0" if value == 0 else f"{value:.3g}"
