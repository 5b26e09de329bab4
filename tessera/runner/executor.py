"""The executor: brings a model and its cache into memory, then runs steps.

One rank today. The scheduler above it sees `start` and `begin` only, so that more ranks need no change
there.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from tessera.attention.choose import build_attention
from tessera.attention.contract import Phase, Shape
from tessera.attention.selftest import self_test
from tessera.attention.step import Attention
from tessera.config import EngineConfig
from tessera.errors import CapacityError, ConfigError
from tessera.log import logger
from tessera.model.gguf_four_bits import FourBitsFound, find_four_bits
from tessera.model.language_model import LanguageModel
from tessera.model.layers.embedding import Head
from tessera.model.layers.linear import Linear
from tessera.model.registry import load_model, num_weight_bytes
from tessera.model.source import ModelSource
from tessera.model.spec import ModelSpec
from tessera.runner import memory
from tessera.runner.calibrate import calibrate
from tessera.runner.device import capability, device_name, shared_memory
from tessera.runner.graph_sizes import GraphLimits
from tessera.runner.graphs import StepGraphs
from tessera.runner.prove import StepLimits, prove_steps
from tessera.runner.runner import Runner, RunningStep
from tessera.runner.sampler import Sampler
from tessera.runner.static_inputs import storage_bytes
from tessera.step import Step
from tessera.types import AttentionChoice, SamplingParams, Sequence


@dataclass(frozen=True)
class Capacity:
    """What `start` found out: how much fits, and what will compute it."""

    num_pages: int
    page_size: int
    max_model_len: int
    attention: list[AttentionChoice]
    load_seconds: float
    num_four_bit_layers: int
    """See EngineInfo."""


class Executor:
    """Runs the steps of one model on one device."""

    def __init__(
        self, config: EngineConfig, source: ModelSource, spec: ModelSpec, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._source, self._spec = config, source, spec
        self._device, self._dtype = device, dtype
        self._runner: Runner | None = None
        self._budget = 0
        """Most tokens of a step; known from `start` on."""

    def start(self, *, max_num_batched_tokens: int, progress: bool) -> Capacity:
        """Choose and test attention, load the weights, size the cache by what is left, allocate it, prove attention.

        Raises ConfigError, ModelError, BackendError or CapacityError.
        """
        self._budget = max_num_batched_tokens
        num_bytes = num_weight_bytes(self._spec, self._dtype, self._device)
        four_bits = self._keeps_four_bits(num_bytes)
        attention, page_size, choices = self._choose_attention()
        started = time.perf_counter()
        model = load_model(
            self._spec,
            self._source,
            dtype=self._dtype,
            device=self._device,
            load_format=self._config.model.load_format,
            seed=self._config.model.seed,
            four_bits=four_bits,
            progress=progress,
        )
        if self._config.device.cpu_four_bits and not model.num_four_bit_layers:
            self._refuse_four_bits(f"no layer of {self._source.name} is whole in them")
        load_seconds = time.perf_counter() - started
        usable = self._usable_bytes(model, attention, page_size, max_num_batched_tokens)
        num_pages, max_model_len = self._num_pages(usable, page_size)
        k_pages, v_pages = self._allocate(num_pages, page_size, self._spec.num_layers)
        graph_limits, said = self._graph_limits(model, attention, num_pages, page_size, max_model_len)
        choices = [replace(c, reason="; ".join(filter(None, (c.reason, said.get(Phase(c.phase)))))) for c in choices]
        self._runner = Runner(model, attention, k_pages, v_pages, self._device, graph_limits)
        limits = StepLimits(
            max_num_seqs=self._config.scheduler.max_num_seqs,
            max_num_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            num_pages=num_pages,
            page_size=page_size,
        )
        if found := calibrate(model, attention, (k_pages, v_pages), limits, self._device):
            unified = f"unified maximum {found.phi:.2f}, which suits {found.model.safe_share:.2%} of rows"
            choices = [replace(c, reason=f"{c.reason}; {unified}") if c.phase == Phase.DECODE else c for c in choices]
        if self._config.attention.prove_attention:
            proofs = prove_steps(attention, self._runner, limits, device_name(self._device))
            choices = [replace(choice, proofs=proofs[choice.phase]) for choice in choices]
        return Capacity(num_pages, page_size, max_model_len, choices, load_seconds, model.num_four_bit_layers)

    def begin(self, step: Step) -> RunningStep:
        """Give the device a step; `start` has returned."""
        if self._runner is None:
            raise RuntimeError("begin() before start()")
        return self._runner.begin(step)

    def logits(self, step: Step) -> Tensor:
        """[tokens, vocab] float32: see Runner.logits."""
        if self._runner is None:
            raise RuntimeError("logits() before start()")
        return self._runner.logits(step)

    def _keeps_four_bits(self, num_weight_bytes: int) -> bool:
        """Whether the file's 4-bit weights are kept beside the others, and whether both fit.

        ConfigError where that is asked in vain, CapacityError where the weights do not fit.
        """
        wanted, share = self._config.device.cpu_four_bits, self._memory_share()
        random = self._config.model.load_format == "dummy" or self._source.random
        found = FourBitsFound(0)
        if wanted is not False:
            found = find_four_bits(self._source, random=random, dtype=self._dtype, device=self._device)
        if wanted and found.refused:
            self._refuse_four_bits(found.refused)
        memory.check_weights_fit(num_weight_bytes, self._device, share)
        try:
            memory.check_weights_fit(num_weight_bytes + found.num_bytes, self._device, share)
        except CapacityError as error:
            if wanted:
                raise CapacityError(
                    f"with the file's own 4-bit ones {error.message}", "leave --cpu-four-bits out"
                ) from None
            logger.warning("no memory is left for the file's own 4-bit weights: few sequences are decoded more slowly")
            return False
        return found.num_bytes > 0

    def _refuse_four_bits(self, reason: str) -> NoReturn:
        raise ConfigError(
            f"--cpu-four-bits asks for products by the file's own 4-bit weights, but {reason}",
            "leave --cpu-four-bits out to have them where they can be had",
        )

    def _graph_limits(
        self, model: LanguageModel, attention: Attention, num_pages: int, page_size: int, max_model_len: int
    ) -> tuple[GraphLimits | None, dict[Phase, str]]:
        """What steps may be recorded, and what to say of each phase; ConfigError where graphs are asked for in vain."""
        wanted = self._config.device.cuda_graphs
        if wanted is False or (self._device.type != "cuda" and wanted is None):
            return None, {}
        refused = [f"the device is {self._device.type}"]
        if self._device.type == "cuda":
            refused = StepGraphs.refused(attention, Sampler(self._spec.eos_token_ids, self._device))
        if wanted and refused:
            raise ConfigError(
                f"--cuda-graphs asks that decode steps are replayed as CUDA graphs, but {', '.join(refused)}",
                "name another --decode-attention, or leave --cuda-graphs out to use them where they are allowed",
            )
        graphs = GraphLimits(self._config.scheduler.max_num_seqs, max_model_len, page_size, num_pages)
        limits = self._with_prompts(model, graphs)
        said = {Phase.DECODE: f"not in CUDA graphs everywhere: {', '.join(refused)}" if refused else "in CUDA graphs"}
        of_prompts = [attention.graphs_refused(Phase.PREFILL, each) for each in attention.bound(Phase.PREFILL)]
        launched = list(dict.fromkeys(reason for reasons in of_prompts for reason in reasons))
        said[Phase.PREFILL] = f"in CUDA graphs up to {limits.most_tokens} tokens a step"
        if launched:
            said[Phase.PREFILL] = f"not in CUDA graphs everywhere: {', '.join(launched)}"
        return limits, said

    def _with_prompts(self, model: LanguageModel, graphs: GraphLimits) -> GraphLimits:
        products = [each for each in model.modules() if isinstance(each, Linear) and not isinstance(each, Head)]
        num_weights = sum(product.weight.numel() for product in products)
        return graphs.worth(self._budget, num_weights)

    def _choose_attention(self) -> tuple[Attention, int, list[AttentionChoice]]:
        """Attention that has passed its self-test, its page size, and how each backend was chosen."""
        max_len = min(self._spec.max_position, self._config.model.max_model_len or self._spec.max_position)
        attention, page_size, choices = build_attention(
            self._config.attention, self._layer_shapes(), self._config.cache.page_size, max_len
        )
        for phase in Phase:
            self_test(backend for of_step in attention.bound(phase) for backend in of_step)
        return attention, page_size, choices

    def _layer_shapes(self) -> list[Shape]:
        spec = self._spec
        return [
            Shape(
                num_q_heads=spec.num_q_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                scale=spec.scale,
                dtype=self._dtype,
                device_type=self._device.type,
                capability=capability(self._device),
                shared_memory=shared_memory(self._device),
                window=window,
            )
            for window in spec.windows
        ]

    def _memory_share(self) -> float:
        """The share of free memory that the weights may take: on a CPU some must be left for the cache."""
        return self._config.cache.gpu_memory_utilization if self._device.type == "cuda" else 0.9

    def _num_pages(self, usable_bytes: int, page_size: int) -> tuple[int, int]:
        """Pages to allocate, and the longest sequence; an explicit --max-model-len or --num-pages is kept."""
        config, position_limit = self._config, self._spec.max_position
        wanted = config.model.max_model_len or position_limit
        if config.cache.num_pages is not None:
            num_pages = config.cache.num_pages
            memory.check_pages_fit(num_pages * self._page_bytes(page_size), num_pages, self._device)
        else:
            useful = config.scheduler.max_num_seqs * -(-wanted // page_size)
            least = wanted if config.model.max_model_len else min(wanted, page_size)
            num_pages = memory.num_pages_that_fit(usable_bytes, self._page_bytes(page_size), useful, least, page_size)
        fits = num_pages * page_size
        if fits < wanted and config.model.max_model_len:
            raise CapacityError(
                f"--num-pages {num_pages} of {page_size} tokens cannot hold one sequence of {wanted} tokens",
                f"use --num-pages {-(-wanted // page_size)} or --max-model-len {fits}",
            )
        if fits < wanted:
            logger.warning("the model takes %d tokens, memory has room for %d: the context is %d", wanted, fits, fits)
        return num_pages, min(wanted, fits)

    def _page_bytes(self, page_size: int) -> int:
        spec = self._spec
        return spec.num_layers * 2 * page_size * spec.num_kv_heads * spec.head_dim * self._dtype.itemsize

    def _allocate(self, num_pages: int, page_size: int, num_layers: int) -> tuple[list[Tensor], list[Tensor]]:
        """Pools of zeros: masked slots are multiplied by 0, which must not meet NaN in memory never written."""
        shape = (num_pages, page_size, self._spec.num_kv_heads, self._spec.head_dim)
        pools = [[_zeros(shape, self._dtype, self._device) for _ in range(num_layers)] for _ in range(2)]
        return pools[0], pools[1]

    def _usable_bytes(self, model: LanguageModel, attention: Attention, page_size: int, max_tokens: int) -> int:
        """Bytes the cache may take: on CUDA what the largest step leaves, on a CPU a share of free RAM."""
        cache = self._config.cache
        if self._device.type != "cuda":
            return int(memory.free_memory_bytes(self._device) * cache.cpu_memory_utilization)
        total = torch.cuda.mem_get_info(self._device)[1]
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self._run_largest_step(model, attention, page_size, max_tokens)
        activations = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        taken = total - memory.free_memory_bytes(self._device)
        return int(total * cache.gpu_memory_utilization) - taken - activations - self._graph_bytes(model, page_size)

    def _graph_bytes(self, model: LanguageModel, page_size: int) -> int:
        """What graphs share: inputs, logits and a layer's activations, of the largest with and without prompts."""
        if self._config.device.cuda_graphs is False:
            return 0
        spec, size, most = self._spec, self._dtype.itemsize, self._config.scheduler.max_num_seqs
        layer = size * (8 * spec.hidden_size + 3 * spec.intermediate_size)
        longest = self._config.model.max_model_len or spec.max_position
        limits = self._with_prompts(model, GraphLimits(most, min(longest, spec.max_position), page_size, 1))
        inputs = storage_bytes(limits) + 4 * most * limits.most_pages
        return 3 * most * 4 * spec.vocab_size + (2 * most + limits.most_tokens) * layer + inputs

    def _run_largest_step(self, model: LanguageModel, attention: Attention, page_size: int, max_tokens: int) -> None:
        """Run a step as large as any will be, with sampling, over one layer's worth of scratch pages."""
        num_seqs = min(self._config.scheduler.max_num_seqs, max_tokens)
        length = min(max(1, max_tokens // num_seqs), self._spec.max_position)
        pages_each = -(-length // page_size)
        k_pages, v_pages = self._allocate(num_seqs * pages_each, page_size, 1)
        num_layers = self._spec.num_layers
        runner = Runner(model, attention, k_pages * num_layers, v_pages * num_layers, self._device)
        params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1)
        sequences = [
            Sequence("profile", i, [0] * length, length, params, i, list(range(i * pages_each, (i + 1) * pages_each)))
            for i in range(num_seqs)
        ]
        runner.run(Step.of(dict.fromkeys(sequences, length)))
        torch.cuda.synchronize(self._device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU memory that the system hands out when it is first touched, where torch.zeros touches all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
