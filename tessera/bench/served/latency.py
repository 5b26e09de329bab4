"""What a load's replies amount to: latencies, their percentiles, throughput, and goodput under a promise.

Of a reply that failed nothing is computed: each function here raises ValueError for one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.bench.served.load import Load, Reply
from tessera.bench.statistics import percentile

PERCENTILES = (50, 90, 99)
MAX_CLIENT_CPU = 0.8
"""Of a core: a client that uses more has no time left to note arrivals when they happen."""
MAX_LATE_SHARE = 0.1
"""Of a latency: a client that is later than that is part of the figure."""


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


def bottleneck(load: Load, *, has_gaps: bool = True) -> str:
    """Why the client, and not the server, may be what was measured; '' where it was not. Failed replies are left out.

    It was when one of its processes used more than MAX_CLIENT_CPU of a core, or when it was late by more than
    MAX_LATE_SHARE: in sending calls, of TTFT; in coming to what arrived, of ITL (of TTFT, where gaps between tokens are
    no figure, `has_gaps`, or there are none). Like is held against like, at each percentile of which there are values
    enough (10 for the 90th, 100 for the 99th, as reports have it): half of all calls sent late spoil the median, one or
    two of a hundred the 99th percentile and nothing before it. To hold the latest of all calls against the median would
    call a client of a thousand good calls and one bad the bottleneck, and the more often the longer it measures.
    Sending alone would not do either: calls of a closed loop are sent at its start, and a client too slow to read is
    late only then.
    """
    reasons = []
    if load.client_cpu > MAX_CLIENT_CPU:
        reasons.append(f"it used {load.client_cpu:.0%} of a core")
    good = [reply for reply in load.replies if reply.ok]
    firsts, gaps = [ttft_ms(reply) for reply in good], [gap for reply in good for gap in itl_ms(reply) if has_gaps]
    if spoilt := _spoilt(lag_ms(load), firsts):
        reasons.append(f"it sent calls {spoilt[1]:.1f} ms late (p{spoilt[0]}), with a TTFT of {spoilt[2]:.1f} ms there")
    if spoilt := _spoilt(wake_ms(load), gaps or firsts):
        what = "gap between tokens" if gaps else "TTFT"
        reasons.append(
            f"it noted arrivals after {spoilt[1]:.1f} ms (p{spoilt[0]}), with a {what} of {spoilt[2]:.1f} ms"
        )
    return f"the client was the bottleneck: {' and '.join(reasons)}" if reasons else ""


def lag_ms(load: Load) -> list[float]:
    """How late each call was sent, but for those that failed."""
    return [1000 * (reply.sent_s - reply.due_s) for reply in load.replies if reply.ok]


def wake_ms(load: Load) -> list[float]:
    """How late the client came to what had arrived, at moments spread evenly over the load."""
    return [1000 * late for late in load.wake_s]


def client_figures(load: Load) -> dict[str, float]:
    """What the client did itself: `client_cpu` of its busiest process, `client_cpu_total`, `client_processes`,
    `client_lag_ms` (the most) with its percentiles, and those of `client_wake_ms`.
    """
    found = {"client_cpu": load.client_cpu, "client_cpu_total": load.client_cpu_total}
    found |= {"client_processes": float(load.num_processes), "client_lag_ms": 1000 * load.lag_s}
    return found | summary("client_lag_ms", lag_ms(load)) | summary("client_wake_ms", wake_ms(load))


def _spoilt(late: Sequence[float], latencies: Sequence[float]) -> tuple[int, float, float] | None:
    """The first percentile at which `late` is too much of `latencies`, and both there; None where none is."""
    for percent in PERCENTILES if late and latencies else ():
        is_figure = percent == 50 or len(latencies) * (100 - percent) >= 100
        ours, whole = percentile(late, percent), percentile(latencies, percent)
        if is_figure and ours > MAX_LATE_SHARE * whole:
            return percent, ours, whole
    return None


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
