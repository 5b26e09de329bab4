"""What a load's replies amount to: latencies, their percentiles, throughput, and goodput under a promise.

Of a reply that failed nothing is computed: each function here raises ValueError for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.bench.served.client import Load, Reply
from tessera.bench.statistics import percentile

PERCENTILES = (50, 90, 99)
MAX_CLIENT_CPU = 0.8
"""Of a core: a client that uses more has no time left to note arrivals when they happen."""
MAX_LAG_SHARE = 0.1
"""Of the median TTFT: a call that was sent later than that after its time was part of another load than asked for."""


@dataclass(frozen=True)
class Promise:
    """What a request must keep to count as good: a service level objective."""

    ttft_ms: float
    tpot_ms: float

    def kept_by(self, reply: Reply) -> bool:
        """Whether the first token came in time, and the others at the pace that was promised."""
        return ttft_ms(reply) <= self.ttft_ms and (tpot_ms(reply) or 0.0) <= self.tpot_ms


def ttft_ms(reply: Reply) -> float:
    """From sending to the first token (not the first chunk: one with a role only is none)."""
    return 1000 * (_checked(reply).token_s[0] - reply.sent_s)


def due_ttft_ms(reply: Reply) -> float:
    """From when it was due to the first token: a client that sends late cannot hide it here."""
    return 1000 * (_checked(reply).token_s[0] - reply.due_s)


def tpot_ms(reply: Reply) -> float | None:
    """Mean time of a token after the first: from first to last, by their number less one; None for a single token."""
    times = _checked(reply).token_s
    return 1000 * (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def itl_ms(reply: Reply) -> list[float]:
    """The gap before each token after the first chunk.

    Tokens that came together share the gap before them: 3 tokens after 30 ms are 3 gaps of 10 ms. Tokens that came
    together with the first have no gap that could be seen and are left out.
    """
    gaps: list[float] = []
    times = _checked(reply).token_s
    before = times[0]
    for at, number in Counter(times).items():  # in order of arrival
        if at > times[0]:
            gaps += [1000 * (at - before) / number] * number
            before = at
    return gaps


def e2e_ms(reply: Reply) -> float:
    """From sending to the end of the stream."""
    return 1000 * (_checked(reply).end_s - reply.sent_s)


def summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """`{name}_mean`, `{name}_p50`, `_p90`, `_p99`; {} of no values."""
    if not values:
        return {}
    points = {f"{name}_p{percent}": percentile(values, percent) for percent in PERCENTILES}
    return {f"{name}_mean": sum(values) / len(values)} | points


def samples(load: Load) -> dict[str, list[float]]:
    """`ttft_ms`, `tpot_ms`, `e2e_ms`, one a request (no tpot for a single token), and `itl_ms`, one a token."""
    paces = [tpot_ms(reply) for reply in load.replies]
    return {
        "ttft_ms": [ttft_ms(reply) for reply in load.replies],
        "tpot_ms": [pace for pace in paces if pace is not None],
        "itl_ms": [gap for reply in load.replies for gap in itl_ms(reply)],
        "e2e_ms": [e2e_ms(reply) for reply in load.replies],
    }


def throughput(load: Load) -> dict[str, float]:
    """`req_s`, `output_tok_s`, `prompt_tok_s`, `total_tok_s`: in all seconds of the load, idle ones included."""
    output = sum(_checked(reply).output_tokens for reply in load.replies)
    prompt = sum(reply.prompt_tokens for reply in load.replies)
    counts = {"req": len(load.replies), "output_tok": output, "prompt_tok": prompt, "total_tok": output + prompt}
    return {f"{name}_s": count / load.seconds for name, count in counts.items()}


def goodput(load: Load, promise: Promise) -> dict[str, float]:
    """`goodput_share` of all requests, and `goodput_req_s`."""
    kept = sum(promise.kept_by(reply) for reply in load.replies)
    return {"goodput_share": kept / len(load.replies), "goodput_req_s": kept / load.seconds}


def bottleneck(load: Load) -> str:
    """Why the client, and not the server, may be what was measured; '' where it was not. Failed replies are left out.

    It was when it used more than MAX_CLIENT_CPU of a core, or sent a call later than MAX_LAG_SHARE of the median TTFT.
    """
    reasons = []
    if load.client_cpu > MAX_CLIENT_CPU:
        reasons.append(f"it used {load.client_cpu:.0%} of a core")
    firsts = [ttft_ms(reply) for reply in load.replies if reply.ok]
    if firsts and 1000 * load.lag_s > MAX_LAG_SHARE * (median := percentile(firsts, 50)):
        reasons.append(f"it sent a call {1000 * load.lag_s:.1f} ms late, with a median TTFT of {median:.1f} ms")
    return f"the client was the bottleneck: {' and '.join(reasons)}" if reasons else ""


def wrong_lengths(replies: Sequence[Reply], asked: Sequence[int]) -> str:
    """Which prompts the server counted otherwise than they were asked to be; '' where none."""
    counted = Counter((num_asked, reply.prompt_tokens) for num_asked, reply in zip(asked, replies, strict=True))
    wrong = {pair: number for pair, number in sorted(counted.items()) if pair[0] != pair[1]}
    if not wrong:
        return ""
    said = ", ".join(f"{number} of {told} where {wanted} were asked for" for (wanted, told), number in wrong.items())
    return f"the server counted other prompt tokens than it was sent: {said:.300}"


def failures(load: Load) -> str:
    """`2 of 8 requests failed: 2x HTTP 500: ...`, the commonest reasons first; '' where none failed."""
    reasons = Counter(reply.error for reply in load.failed)
    if not reasons:
        return ""
    said = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common(5))
    return f"{len(load.failed)} of {len(load.replies)} requests failed: {said}"


def _checked(reply: Reply) -> Reply:
    if not reply.ok:
        raise ValueError(f"request {reply.index} failed and has no figures: {reply.error}")
    return reply
