"""A small replay, the same for all tests of what is replayed."""

from __future__ import annotations

from tessera.bench.online.benchmark import OnlineBenchmark, Replay
from tessera.bench.online.trace import poisson
from tessera.bench.online.trace_prompts import PLAIN_IDS, Vocabulary
from tessera.bench.record import Record

REPLAY = Replay(
    trace=poisson(rate=40, number=4, input_len="8", output_len="5", seed=0),
    scales=[0.5, 1.0],
    vocabulary=Vocabulary(PLAIN_IDS),
    case={"rate": 40, "input_len": "8"},
    num_warmup=1,
    timeout_s=5,
)


def rows_of(benchmark: OnlineBenchmark) -> list[Record]:
    return list(benchmark.records())
