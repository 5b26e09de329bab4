"""The engine's counters in Prometheus' text format."""

from __future__ import annotations

from tessera.server.engine_client import EngineClient

METRICS = (
    ("sequences_running", "gauge", "Sequences in the running batch.", "running"),
    ("sequences_waiting", "gauge", "Sequences that wait for pages or a place.", "waiting"),
    ("pages_total", "gauge", "Pages of the KV cache.", "pages_total"),
    ("pages_free", "gauge", "Pages a new sequence could take.", "pages_free"),
    ("steps_total", "counter", "Steps computed.", "steps"),
    ("preemptions_total", "counter", "Sequences put back to be recomputed.", "preemptions"),
    ("prompt_tokens_total", "counter", "Prompt tokens of scheduled sequences.", "prompt_tokens"),
    ("cached_prompt_tokens_total", "counter", "Prompt tokens found in the prefix cache.", "cached_prompt_tokens"),
    ("generated_tokens_total", "counter", "Tokens generated.", "generated_tokens"),
)
"""Name, type, help and field of EngineStatus."""


def render(client: EngineClient) -> str:
    """All metrics as they were when the engine last spoke."""
    lines: list[str] = []
    values = [(name, kind, text, getattr(client.status, field)) for name, kind, text, field in METRICS]
    values.append(("pages_used_peak", "gauge", "Most pages in use after any step.", client.peak_pages))
    values.append(("engine_up", "gauge", "1 while the engine answers.", int(client.problem() is None)))
    for name, kind, text, value in values:
        lines += [f"# HELP tessera_{name} {text}", f"# TYPE tessera_{name} {kind}", f"tessera_{name} {value}"]
    return "\n".join(lines) + "\n"
