"""What `/metrics` shows, as Prometheus' own library writes it: the engine's counters, latencies, and responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tessera import __version__
from tessera.server.engine_client import EngineClient
from tessera.server.latency import Histogram, Latency

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

GAUGES = (
    ("sequences_running", "Sequences in the running batch.", "running"),
    ("sequences_waiting", "Sequences that wait for pages or a place.", "waiting"),
    ("pages_total", "Pages of the KV cache.", "pages_total"),
    ("pages_free", "Pages a new sequence could take.", "pages_free"),
)
"""Name, help and field of EngineStatus."""
COUNTERS = (
    ("steps", "Steps computed.", "steps"),
    ("preemptions", "Sequences put back to be recomputed.", "preemptions"),
    ("prompt_tokens", "Prompt tokens of scheduled sequences.", "prompt_tokens"),
    ("cached_prompt_tokens", "Prompt tokens found in the prefix cache.", "cached_prompt_tokens"),
    ("generated_tokens", "Tokens generated.", "generated_tokens"),
)
"""Name without `_total`, help and field of EngineStatus."""
HISTOGRAMS = (
    (
        "time_to_first_token_seconds",
        "Seconds from a request's sending to the engine to a sequence's first token.",
        "first_token",
    ),
    ("inter_token_seconds", "Seconds between a sequence's tokens, by the engine's clock.", "inter_token"),
    ("sequence_seconds", "Seconds from a request's sending to the engine to a sequence's end, no aborts.", "sequence"),
)
"""Name, help and field of Latency."""


class EngineCollector(Collector):
    """All metrics of one server, as they are when asked for."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        """One family a name, each beginning with `tessera_`."""
        client = self._client
        yield _engine(client)
        yield GaugeMetricFamily("tessera_engine_up", "1 while the engine answers.", int(client.problem() is None))
        for name, text, field in GAUGES:
            yield GaugeMetricFamily(f"tessera_{name}", text, getattr(client.status, field))
        yield GaugeMetricFamily("tessera_pages_used_peak", "Most pages in use after any step.", client.peak_pages)
        for name, text, field in COUNTERS:
            yield CounterMetricFamily(f"tessera_{name}", text, getattr(client.status, field))
        yield from _counted(client.latency)
        for name, text, field in HISTOGRAMS:
            yield _histogram(f"tessera_{name}", text, getattr(client.latency, field))


def _engine(client: EngineClient) -> Metric:
    info = client.info
    labels = {"version": __version__, "model": info.model, "dtype": info.dtype, "device": info.device}
    labels |= {choice.phase: choice.backend for choice in info.attention}
    return InfoMetricFamily("tessera_engine", "What is served, and the attention backend of each phase.", labels)


def _counted(latency: Latency) -> Iterator[Metric]:
    text = "Sequences that ended; abort: left by the client, refused or given up."
    finished = CounterMetricFamily("tessera_sequences_finished", text, labels=["reason"])
    for reason in ("stop", "length", "abort"):
        finished.add_metric([reason], latency.finished[reason])
    yield finished
    text = "Responses of the routes; 499: the client left before there was one."
    responses = CounterMetricFamily("tessera_http_responses", text, labels=["path", "status"])
    for (path, status), count in sorted(latency.responses.items()):
        responses.add_metric([path, str(status)], count)
    yield responses


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
    return HistogramMetricFamily(name, text, buckets, histogram.total)


def render(client: EngineClient) -> bytes:
    """All metrics as Prometheus' text, format 0.0.4."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(client))
    return generate_latest(registry)


class CountResponses:
    """Counts the responses of an application by path and status; every path that is not in `paths` is `other`."""

    def __init__(self, app: ASGIApp, latency: Latency, paths: frozenset[str]) -> None:
        self._app, self._responses, self._paths = app, latency.responses, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, begun = scope["path"] if scope["path"] in self._paths else "other", False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._responses[path, message["status"]] += 1
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:  # answered outside of every middleware
            self._responses[path, 500] += not begun
            raise
