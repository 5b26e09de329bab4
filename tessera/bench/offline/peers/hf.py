"""Hugging Face transformers: `model.generate` on left-padded batches, which is what its users call."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

Ids = list[list[int]]


class Worker:
    """A causal language model of transformers; run by serve.py."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Weights from a folder, or random ones of its config.json; `batch_size` prompts go at once.

        Left out, they are as many as our engine runs at once.
        """
        torch: Any = import_module("torch")
        transformers: Any = import_module("transformers")
        options = dict(settings["options"])
        self.batch_size = int(options.pop("batch_size", settings["max_num_seqs"]))
        dtype = getattr(torch, settings["dtype"])
        if settings.get("cpu_threads"):
            torch.set_num_threads(settings["cpu_threads"])
        auto = transformers.AutoModelForCausalLM
        if settings["load_format"] == "dummy":
            torch.manual_seed(settings["seed"])
            config = transformers.AutoConfig.from_pretrained(settings["model"])
            self.model = auto.from_config(config, dtype=dtype, **options)
        else:
            self.model = auto.from_pretrained(settings["model"], dtype=dtype, **options)
        self.model = self.model.to(settings["device"]).train(False)
        self.model.generation_config = transformers.GenerationConfig()  # a model's own top-k would be taken silently
        self.device, self.torch, self.transformers = settings["device"], torch, transformers
        torch.manual_seed(settings["seed"])
        return {
            "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
            "settings": {"batch_size": self.batch_size, "attn_implementation": self.model.config._attn_implementation},
            "note": "static batches: each lasts until its longest output is done",
        }

    def run(self, prompts: Ids, output_lens: list[int], temperature: float) -> dict[str, Any]:
        """All prompts, in batches in the given order; a request's latency ends with its batch."""
        with self.torch.inference_mode():
            return self._run(prompts, output_lens, temperature)

    def _run(self, prompts: Ids, output_lens: list[int], temperature: float) -> dict[str, Any]:
        outputs: Ids = []
        latencies: list[float] = []
        started = time.perf_counter()
        for first in range(0, len(prompts), self.batch_size):
            wanted = output_lens[first : first + self.batch_size]
            made = self._generate(prompts[first : first + self.batch_size], max(wanted), temperature)
            outputs += [row[:length] for row, length in zip(made, wanted)]
            latencies += [time.perf_counter() - started] * len(wanted)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "prompt_tokens": sum(map(len, prompts)),
            "latencies_s": latencies,
            "output_ids": outputs,
        }

    def _generate(self, batch: Ids, num_tokens: int, temperature: float) -> Ids:
        """The new tokens of each prompt; `.tolist()` waits for the device."""
        torch, width = self.torch, max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=self.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        config = self.transformers.GenerationConfig(
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        made: Ids = self.model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        return made

    def memory(self) -> dict[str, int]:
        """Of this process."""
        peak: dict[str, int] = import_module("tessera_peer").torch_peak_bytes()
        return peak
