"""llama.cpp through the package llama-cpp-python: its batched decoding, on the GGUF file as it is.

The package's own `Llama` runs one text at a time; this fills llama.cpp's batches as its server does, with the tokens of
all running sequences first and pieces of prompts behind them, so that the peer is not held back.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

Ids = list[list[int]]


@dataclass
class _Text:
    """One prompt on its way: what of it is computed, and what came out."""

    index: int
    prompt: list[int]
    wanted: int
    slot: int = -1
    computed: int = 0
    output: list[int] = field(default_factory=list)


class Worker:
    """A llama.cpp context with room for `n_parallel` texts at once; run by serve.py."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The weights as the file has them; options are fields of llama.cpp's parameters, and `n_parallel`.

        Left out, they are as many texts at once as our engine runs, and as many threads as there are cores: llama.cpp
        itself would take four.
        """
        api: Any = import_module("llama_cpp")
        self.api, options = api, dict(settings["options"])
        self.num_slots = int(options.pop("n_parallel", settings["max_num_seqs"]))
        self.seed = settings["seed"] % 2**32
        api.llama_backend_init()
        of_model, of_context = api.llama_model_default_params(), api.llama_context_default_params()
        of_context.n_seq_max = self.num_slots
        of_context.n_ctx = self.num_slots * (settings["max_model_len"] + 1)
        of_context.no_perf = True
        of_model.n_gpu_layers = 0 if settings["device"] == "cpu" else 999
        of_context.n_threads = of_context.n_threads_batch = settings.get("cpu_threads") or _num_cores()
        for name, value in options.items():
            _set_field(name, value, of_model, of_context)
        self.model = api.llama_model_load_from_file(settings["model"].encode(), of_model)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        self.context = api.llama_init_from_model(self.model, of_context)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: too little memory, or options it refuses")
        self.batch_size = int(of_context.n_batch)
        self.batch = api.llama_batch_init(self.batch_size, 0, 1)
        threads = {name: int(getattr(of_context, name)) for name in ("n_threads", "n_threads_batch")}
        shown = {"n_parallel": self.num_slots, "n_batch": self.batch_size, **threads, **options}
        versions, dtype = {"llama-cpp-python": api.__version__}, settings["file_type"]
        note = f"weights as the file has them: {dtype}"
        return {"versions": versions, "settings": shown, "note": note, "dtype": dtype}

    def run(self, prompts: Ids, output_lens: list[int], temperature: float) -> dict[str, Any]:
        """All prompts; as many at once as there are slots, the next one as soon as one is free."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), False)
        sampler = self._sampler(temperature)
        waiting = [_Text(index, *pair) for index, pair in enumerate(zip(prompts, output_lens))][::-1]
        free, running = list(range(self.num_slots)), list[_Text]()
        outputs: Ids = [[] for _ in prompts]
        first, last = [0.0] * len(prompts), [0.0] * len(prompts)
        started = time.perf_counter()
        while waiting or running:
            while waiting and free:
                running.append(waiting.pop())
                running[-1].slot = free.pop()
            sampling = self._decode(running)
            for place, text in sampling:
                text.output.append(int(api.llama_sampler_sample(sampler, self.context, place)))
                last[text.index] = time.perf_counter() - started
                if len(text.output) == 1:
                    first[text.index] = last[text.index]
            for text in [text for text in running if len(text.output) == text.wanted]:
                outputs[text.index] = text.output
                api.llama_memory_seq_rm(api.llama_get_memory(self.context), text.slot, -1, -1)
                running.remove(text)
                free.append(text.slot)
        seconds = time.perf_counter() - started
        api.llama_sampler_free(sampler)
        return {
            "seconds": seconds,
            "prompt_tokens": sum(map(len, prompts)),
            "first_token_s": first,
            "latencies_s": last,
            "output_ids": outputs,
        }

    def _decode(self, running: list[_Text]) -> list[tuple[int, _Text]]:
        """Compute one batch; (place in it, text) of each text whose next token it decides."""
        batch, sampling, size = self.batch, list[tuple[int, _Text]](), 0
        for text in sorted(running, key=lambda text: not text.output):
            tokens = (text.prompt + text.output)[text.computed :][: self.batch_size - size]
            for token in tokens:
                batch.token[size], batch.pos[size] = token, text.computed
                batch.n_seq_id[size], batch.seq_id[size][0] = 1, text.slot
                text.computed += 1
                reached = text.computed == len(text.prompt) + len(text.output)
                batch.logits[size] = int(reached)
                if reached:
                    sampling.append((size, text))
                size += 1
        batch.n_tokens = size
        if (code := self.api.llama_decode(self.context, batch)) != 0:
            raise RuntimeError(f"llama_decode of {size} tokens answered {code}")
        return sampling

    def _sampler(self, temperature: float) -> Any:
        """The whole vocabulary at a temperature, or the most likely token at 0; nothing is truncated."""
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature > 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(temperature))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(self.seed))
        else:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        return chain

    def memory(self) -> dict[str, int]:
        """Of this process, in RAM; what llama.cpp holds on a GPU is not known."""
        return {"host": import_module("tessera_peer").host_peak_bytes()}


def _num_cores() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # no such call on macOS
        return os.cpu_count() or 1


def _set_field(name: str, value: Any, *structures: Any) -> None:
    """Set a parameter in whichever structure has it; ValueError where none does."""
    for structure in structures:
        if name in {field_name for field_name, *_ in structure._fields_}:
            setattr(structure, name, value)
            return
    raise ValueError(f"llama.cpp has no parameter {name}")
