"""Peers run by path, without tessera on the way: the same ids in, as many tokens out as asked, no truncation."""

from __future__ import annotations

import ast
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tessera.bench.offline import worker as worker_of_ours
from tessera.bench.offline.benchmark import OfflineBenchmark
from tessera.bench.offline.entrants import _peer_options, _peer_settings
from tessera.bench.offline.export import folder_of
from tessera.bench.offline.options import OfflineOptions
from tessera.bench.offline.peers import serve
from tessera.bench.offline.target import target_of
from tessera.bench.offline.worker_process import WorkerError, WorkerProcess
from tessera.bench.provenance import provenance
from tessera.config import EngineConfig, ModelConfig
from tessera.model.gguf_file import GGUFFile
from tessera.model.source import find_model

PEERS = Path(serve.__file__).parent
PROMPTS = [[1, 2, 3, 4, 5], [9, 8], [100, 200, 300]]
OUTPUT_LENS = [3, 5, 4]

VLLM = """
__version__ = "0.24.0"
given = {}

class SamplingParams:
    def __init__(self, **fields):
        assert fields.keys() == {"temperature", "ignore_eos", "max_tokens", "detokenize"}, fields
        assert fields["ignore_eos"] is True and fields["detokenize"] is False and fields["temperature"] == 0.6
        self.__dict__.update(fields)

class LLM:
    def __init__(self, model, dtype, load_format, max_model_len, enable_prefix_caching, seed, skip_tokenizer_init,
                 **more):
        assert (dtype, load_format, skip_tokenizer_init, enable_prefix_caching) == ("bfloat16", "dummy", True, False)
        if more.pop("max_num_seqs", None) == 0:
            import sys
            sys.stderr.write("(EngineCore pid=7) ERROR 11-21 22:06:15 [core.py:1231] AssertionError: of a log\\n"
                             "(EngineCore pid=7) Traceback (most recent call last):\\n"
                             "(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.\\n"
                             "Traceback (most recent call last):\\nlast line\\n")
            raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        assert more == {"gpu_memory_utilization": 0.5}, more
        print("vllm prints to stdout")
        from types import SimpleNamespace as Made
        scheduler = Made(max_num_seqs=1024, max_num_batched_tokens=16384, async_scheduling=True)
        compilation = Made(mode=Made(name="VLLM_COMPILE"), cudagraph_mode=Made(name="FULL_AND_PIECEWISE"))
        cache = Made(num_gpu_blocks=None, block_size=16)
        self.llm_engine = Made(vllm_config=Made(scheduler_config=scheduler, cache_config=cache,
                                                compilation_config=compilation))

    def generate(self, prompts, sampling_params, use_tqdm):
        from types import SimpleNamespace as Made
        return [Made(prompt_token_ids=prompt["prompt_token_ids"], outputs=[Made(token_ids=[1] * params.max_tokens)])
                for prompt, params in zip(prompts, sampling_params)]
"""

LLAMA_CPP = """
# The part of llama-cpp-python 0.3.36's low-level API that is used: names, argument order, fields.
__version__ = "0.3.36"
from types import SimpleNamespace as Made
import collections

class Params:
    def __init__(self): self.n_batch, self.n_threads, self.n_threads_batch = 4, 4, 4
class ModelParams(Params):
    _fields_ = [("n_gpu_layers", int), ("use_mmap", bool)]
class ContextParams(Params):
    _fields_ = [("n_ctx", int), ("n_batch", int), ("n_seq_max", int), ("n_threads", int), ("n_threads_batch", int)]

class Batch:
    def __init__(self, size):
        self.size, self.n_tokens = size, 0
        self.token, self.pos, self.n_seq_id, self.logits = ([0] * size for _ in range(4))
        self.seq_id = [[0] for _ in range(size)]

seen = collections.defaultdict(list)
outputs = set()
def llama_backend_init(): pass
def llama_model_default_params(): return ModelParams()
def llama_context_default_params(): return ContextParams()
def llama_model_load_from_file(path, params): assert isinstance(path, bytes); return Made(params=params)
def llama_init_from_model(model, params): return Made(params=params)
def llama_batch_init(n_tokens, embd, n_seq_max): assert (embd, n_seq_max) == (0, 1); return Batch(n_tokens)
def llama_get_memory(context): return context
def llama_memory_clear(memory, data): seen.clear()
def llama_memory_seq_rm(memory, seq_id, p0, p1): assert (p0, p1) == (-1, -1); seen.pop(seq_id)
def llama_decode(context, batch):
    outputs.clear()
    assert 0 < batch.n_tokens <= batch.size
    for i in range(batch.n_tokens):
        slot = batch.seq_id[i][0]
        assert 0 <= slot < context.params.n_seq_max and batch.n_seq_id[i] == 1
        assert batch.pos[i] == len(seen[slot]), "a token is computed once, in order"
        seen[slot].append(batch.token[i])
        if batch.logits[i]: outputs.add(i)
    Batch.last = batch
    return 0
def llama_sampler_chain_default_params(): return Made()
def llama_sampler_chain_init(params): return []
def llama_sampler_chain_add(chain, sampler): chain.append(sampler)
def llama_sampler_init_temp(t): return ("temp", t)
def llama_sampler_init_dist(seed): return ("dist", seed)
def llama_sampler_init_greedy(): return ("greedy",)
def llama_sampler_free(chain): pass
def llama_sampler_sample(chain, context, place):
    assert place in outputs, "only where logits were asked for"
    assert chain == [("temp", 0.6), ("dist", 7)], chain
    return len(seen[Batch.last.seq_id[place][0]])
"""


def started(name: str, settings: dict[str, Any], stub: Path | None = None) -> tuple[WorkerProcess, dict[str, Any]]:
    command = [sys.executable, str(PEERS / "serve.py"), str(PEERS / f"{name}.py")]
    worker = WorkerProcess(command, 120, {"PYTHONPATH": str(stub)} if stub is not None else None)
    common = {"dtype": "float32", "device": "cpu", "load_format": "auto", "max_model_len": 32, "seed": 7, "options": {}}
    common |= {"max_num_seqs": 3, "file_type": "Q4_K", "cpu_threads": None, "gpu_memory_utilization": 0.9}
    return worker, worker.ask("load", settings=common | {"enable_prefix_caching": False} | settings)


@pytest.mark.parametrize("path", sorted(PEERS.glob("*.py")), ids=lambda path: path.name)
def test_peers_import_the_standard_library_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.partition(".")[0] in sys.stdlib_module_names for name in names), names


def test_greedy_tokens_of_transformers_on_our_weights_are_ours(tmp_path: Path) -> None:
    folder = folder_of(find_model(ModelConfig()), torch.float32, tmp_path)

    def answer() -> dict[str, Any]:
        ours = worker_of_ours.Worker()
        ours.load({"dtype": "float32", "max_model_len": 32, "enable_prefix_caching": False, "attention": "torch_sdpa"})
        return ours.run(PROMPTS, OUTPUT_LENS, 0.0)

    with ThreadPoolExecutor() as beside:  # while the other starts, whose parent must be this thread
        answering = beside.submit(answer)
        worker, facts = started("hf", {"model": str(folder), "max_num_seqs": 2})
        expected = answering.result()
    found = worker.ask("run", prompts=PROMPTS, output_lens=OUTPUT_LENS, temperature=0.0)
    assert found["output_ids"] == expected["output_ids"]
    assert found["prompt_tokens"] == expected["prompt_tokens"] == 10
    assert facts["versions"]["transformers"] and worker.ask("memory")["memory"]["host"] > 2**28
    first, last = found["latencies_s"][0], found["latencies_s"][2]
    assert first == found["latencies_s"][1] < last <= found["seconds"], "a request ends with its batch"
    worker.close()


@pytest.mark.parametrize(
    "shares",
    [
        {"gpu_memory_utilization": 0.5},  # as ours
        {"gpu_memory_utilization": 0.3, "options": {"gpu_memory_utilization": 0.5}},  # its own, where it is given one
    ],
    ids=["as ours", "its own"],
)
def test_vllm_is_called_as_its_api_wants(tmp_path: Path, shares: dict[str, Any]) -> None:
    (tmp_path / "vllm.py").write_text(VLLM)
    settings = {"model": "x", "dtype": "bfloat16", "load_format": "dummy"} | shares
    worker, facts = started("vllm", settings, tmp_path)
    shown = facts["settings"]
    assert facts["versions"]["vllm"] == "0.24.0" and shown["gpu_memory_utilization"] == 0.5 and "model" not in shown
    assert (shown["max_num_seqs"], shown["async_scheduling"], shown["block_size"]) == (1024, True, 16)
    assert shown["cudagraph_mode"] == "FULL_AND_PIECEWISE" and "num_gpu_blocks" not in shown
    found = worker.ask("run", prompts=PROMPTS, output_lens=OUTPUT_LENS, temperature=0.6)
    assert [len(output) for output in found["output_ids"]] == OUTPUT_LENS and found["prompt_tokens"] == 10
    worker.close()


def test_peers_are_told_that_a_shape_has_no_weights(tmp_path: Path) -> None:
    config = EngineConfig.from_flat({"model": "dummy:135m", "gpu_memory_utilization": 0.45})
    made = OfflineBenchmark(config, [], OfflineOptions(preset="rose"), 1, provenance("a test"))
    settings = _peer_settings("vllm", {}, made.target, made.config, tmp_path)
    assert (settings["load_format"], settings["max_model_len"]) == ("dummy", 256 + 64)
    assert settings["gpu_memory_utilization"] == 0.45  # what is asked of all
    assert (Path(settings["model"]) / "config.json").exists()


def test_a_start_of_vllm_that_fails_names_what_its_engine_process_wrote(tmp_path: Path) -> None:
    """vLLM's own exception only says "see root cause above"."""
    (tmp_path / "vllm.py").write_text(VLLM)
    settings = {"model": "x", "dtype": "bfloat16", "load_format": "dummy", "options": {"max_num_seqs": 0}}
    with pytest.raises(WorkerError, match=r"above.*; the root cause: torch.OutOfMemoryError: CUDA out of") as refused:
        started("vllm", settings, tmp_path)
    assert refused.value.no_memory


def test_llamacpp_fills_batches_and_computes_every_token_once(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    worker, _ = started("llamacpp", {"model": "x.gguf", "options": {"n_parallel": 2, "n_threads": 1}}, tmp_path)
    for _ in range(2):
        found = worker.ask("run", prompts=PROMPTS, output_lens=OUTPUT_LENS, temperature=0.6)
        # the stub answers with the number of tokens it holds: the prompt's, then one more each time
        expected = [[len(p) + n for n in range(length)] for p, length in zip(PROMPTS, OUTPUT_LENS)]
        assert found["output_ids"] == expected
    worker.close()


def test_llamacpp_gets_the_cores_and_the_texts_at_once_that_we_get_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    num_cores = len(psutil.Process().cpu_affinity())
    for cpu_threads, options, threads, texts in (
        (None, {}, (num_cores, num_cores), 3),
        (7, {}, (7, 7), 3),
        (7, {"n_threads": 1, "n_threads_batch": 2, "n_parallel": 5}, (1, 2), 5),
    ):
        settings = {"model": "x.gguf", "cpu_threads": cpu_threads, "options": options}
        worker, facts = started("llamacpp", settings, tmp_path)
        shown = facts["settings"]
        assert ((shown["n_threads"], shown["n_threads_batch"]), shown["n_parallel"]) == (threads, texts)
        assert facts["dtype"] == "Q4_K" and facts["note"] == "weights as the file has them: Q4_K"
        worker.close()


def test_peers_are_told_of_the_files_type_and_of_how_many_texts_we_run_at_once(tmp_path: Path) -> None:
    config = EngineConfig()
    config = replace(config, scheduler=replace(config.scheduler, max_num_seqs=5))
    target = target_of(config)
    assert target.source.kind == "gguf"
    told = {name: _peer_settings(name, {}, target, config, tmp_path) for name in ("llamacpp", "hf")}
    types = {tensor.type_name for tensor in GGUFFile(target.source.path).tensors.values()}
    assert told["llamacpp"]["file_type"] in types - {"F32"} and told["llamacpp"]["model"] == str(target.source.path)
    assert [each["max_num_seqs"] for each in told.values()] == [5, 5]


def test_a_parameter_that_llamacpp_has_not_is_refused(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    with pytest.raises(WorkerError, match=r"llama\.cpp has no parameter no_such"):
        started("llamacpp", {"model": "x.gguf", "options": {"no_such": 1}}, tmp_path)


def test_a_peer_that_is_not_installed_says_where(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="vllm is not installed in") as refused:
        started("vllm", {"model": "x"}, tmp_path)
    assert refused.value.unavailable


def test_options_of_peers_keep_their_types() -> None:
    text = "vllm:gpu_memory_utilization=0.5, vllm:enforce_eager=true,hf:attn_implementation=eager"
    assert _peer_options(text, ["vllm", "hf"]) == {
        "vllm": {"gpu_memory_utilization": 0.5, "enforce_eager": True},
        "hf": {"attn_implementation": "eager"},
    }
