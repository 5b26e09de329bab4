"""One level of a sweep: so many requests at once, and what their replies amount to.

All requests are sent at one moment and none follows, as the article's tool, llmapibenchmark, does. Definitions:

- generation throughput: output tokens of all requests, by the time from the first sending to the last token;
- prompt throughput: prompt tokens of all requests, by the time from the first sending to the last first token;
- TTFT: from the sending of a request to its first token.

The tool sends two loads, one for TTFT and one, not streamed, for throughput, and takes its network latency off both
times. Here both are of the same load, and nothing is taken off: `network_ms` stands beside them.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

import aiohttp

from tessera.bench.record import CacheState
from tessera.bench.served.answers import ANSWER_SECONDS, plain_cause
from tessera.bench.served.latency import client_figures, ttft_ms
from tessera.bench.served.load import Load, Reply
from tessera.bench.served.servers import Server
from tessera.bench.statistics import percentile
from tessera.errors import TesseraError

NUM_PROBES = 5
SMALLEST_HIT = 16
"""Tokens of a prompt that a cache must have held to count as a hit: prompts drawn at random may begin alike by one or
two, and a page of a cache is of 16 or more."""


def metrics(load: Load) -> dict[str, float]:
    """The figures of a load in which nothing failed; ValueError where something did, or nothing was sent."""
    if not load.replies:
        raise ValueError("a load of no requests has no figures")
    firsts = [ttft_ms(reply) for reply in load.replies]
    began = min(reply.sent_s for reply in load.replies)
    output = sum(reply.output_tokens for reply in load.replies)
    prompt = sum(reply.prompt_tokens for reply in load.replies)
    return {
        "generation_tok_s": output / (max(reply.token_s[-1] for reply in load.replies) - began),
        "prompt_tok_s": prompt / (max(reply.token_s[0] for reply in load.replies) - began),
        "ttft_ms_min": min(firsts),
        "ttft_ms_max": max(firsts),
        "ttft_ms_p50": percentile(firsts, 50),
        "output_tokens": float(output),
        "prompt_tokens": float(prompt),
    } | client_figures(load)


def cached_tokens(replies: Sequence[Reply]) -> int | None:
    """Prompt tokens that came out of the server's prefix cache; None where it does not say of each request."""
    told = [reply.cached_tokens for reply in replies if reply.cached_tokens is not None]
    return sum(told) if len(told) == len(replies) else None


def hits(replies: Sequence[Reply], num_added: int = 0) -> int:
    """Requests whose prompts were found in the cache, beyond the `num_added` tokens that a server adds to each."""
    return sum((reply.cached_tokens or 0) - num_added >= SMALLEST_HIT for reply in replies)


def cache_state(replies: Sequence[Reply], num_added: int = 0, *, is_off: bool = False) -> CacheState:
    """What the replies show of the prefix cache; `off` where it was switched off."""
    if is_off:
        return "off"
    if cached_tokens(replies) is None:
        return "not recorded"
    return "warm" if hits(replies, num_added) else "cold"


async def round_trips_ms(server: Server, path: str, number: int) -> list[float]:
    """Times of `number` GETs of `path`, which begins with / and follows the server's root, on one open connection.

    The GET that opens the connection is not among them. Any status counts: nothing is computed for it. TesseraError
    where the server does not answer.
    """
    url, timeout = server.url.removesuffix("/v1") + path, aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    times = []
    try:
        async with aiohttp.ClientSession(timeout=timeout, headers=server.headers) as session:
            for _ in range(number + 1):
                began = time.perf_counter()
                async with session.get(url) as response:
                    await response.read()
                times.append(1000 * (time.perf_counter() - began))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise TesseraError(f"{url} did not answer: {plain_cause(error)}", "is the server up?") from None
    return times[1:]


def network_ms(server: Server) -> float:
    """Median of NUM_PROBES round trips to the server's root."""
    return statistics.median(asyncio.run(round_trips_ms(server, "/", NUM_PROBES)))
