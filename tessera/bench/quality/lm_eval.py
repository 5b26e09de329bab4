"""Tasks of lm-eval through our server, once a backend, and through transformers beside it.

lm-eval (EleutherAI's lm-evaluation-harness) runs as a process of its own and talks to /v1/completions with its model
`local-completions`: it sends token ids made by the server's /tokenize and reads the logprobs of echoed prompts, so
loglikelihood tasks are served too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tessera.bench.benchmark import Done
from tessera.bench.offline.export import folder_of
from tessera.bench.offline.target import Target, target_of
from tessera.bench.provenance import Provenance
from tessera.bench.quality.lm_eval_results import metrics_of, read_scores
from tessera.bench.quality.options import QualityOptions
from tessera.bench.record import Conditions, Kind, Record, Subject
from tessera.bench.served.servers import ServerProcess, serve_flags
from tessera.bench.subjects import Wanted
from tessera.config import DTypeName, EngineConfig
from tessera.errors import ConfigError, TesseraError
from tessera.log import logger

CONCURRENCY = 8
PIP = "pip install 'tessera-llm[eval]', or --lm-eval-python PYTHON"
_FIND = "import importlib.metadata as m; print(m.version('lm_eval'))"


class LmEvalBenchmark:
    """One row for each backend in each type, and one for transformers where that is asked for.

    ConfigError where lm-eval is not installed, or a folder or python does not exist.
    """

    kind: Kind = "quality"

    def __init__(
        self,
        config: EngineConfig,
        wanted: Mapping[str, Sequence[Wanted]],
        options: QualityOptions,
        provenance: Provenance,
    ) -> None:
        assert options.lm_eval is not None
        self.config, self._wanted, self._options, self._provenance = config, wanted, options, provenance
        self._tasks = ",".join(word.strip() for word in options.lm_eval.split(","))
        if not self._tasks.replace(",", ""):
            raise ConfigError("--lm-eval names no task", "use --lm-eval TASK, and --lm-eval-path for tasks of your own")
        self._folder = Path(options.lm_eval_path).resolve() if options.lm_eval_path is not None else None
        if self._folder is not None and not self._folder.is_dir():
            raise ConfigError(
                f"--lm-eval-path {options.lm_eval_path} is no folder", "give the folder of the task files"
            )
        self._python = options.lm_eval_python or sys.executable
        self._version = _version_of(self._python)

    @property
    def num_records(self) -> int:
        """One a type and subject."""
        return sum(len(backends) + self._options.lm_eval_transformers for backends in self._wanted.values())

    def records(self, done: Container[Done] = ()) -> Iterator[Record]:
        """Rows type by type; see Benchmark."""
        for dtype, backends in self._wanted.items():
            config = replace(self.config, model=replace(self.config.model, dtype=cast(DTypeName, dtype)))
            target = target_of(config)
            for wanted in backends:
                if self._is_done(target, wanted.subject, done):
                    continue
                if wanted.reasons:
                    yield self._row(target, wanted.subject, "unavailable", reason="; ".join(wanted.reasons))
                else:
                    yield self._served(target, config, wanted)
            theirs = Subject("hf", engine="hf", note="not proven: another engine")
            if self._options.lm_eval_transformers and not self._is_done(target, theirs, done):
                yield self._transformers(target, theirs)

    def _served(self, target: Target, config: EngineConfig, wanted: Wanted) -> Record:
        logger.info("%s in %s: starting a server", wanted.label, target.dtype)
        try:
            server = ServerProcess([*serve_flags(config), *_backend_flags(wanted)])
            with server:
                info = server.info
                length = info.max_model_len if info is not None else target.spec.max_position
                arguments = {
                    "model": server.model,
                    "base_url": f"{server.url}/completions",
                    "tokenizer_backend": "remote",
                    "num_concurrent": CONCURRENCY,
                    "max_length": length,
                }
                metrics, samples = self._evaluate("local-completions", arguments)
                return self._row(target, server.subject(wanted), "ok", metrics=metrics, samples=samples)
        except (TesseraError, OSError) as error:
            return self._row(target, wanted.subject, "failed", reason=str(error).splitlines()[0])

    def _transformers(self, target: Target, subject: Subject) -> Record:
        logger.info("transformers in %s", target.dtype)
        with tempfile.TemporaryDirectory(prefix="tessera-bench-") as scratch:
            try:
                model = folder_of(target.source, target.torch_dtype, Path(scratch))
                arguments = {"pretrained": str(model), "dtype": target.dtype}
                metrics, samples = self._evaluate("hf", arguments, "--device", target.device)
                return self._row(target, subject, "ok", metrics=metrics, samples=samples)
            except (TesseraError, OSError) as error:
                return self._row(target, subject, "failed", reason=str(error).splitlines()[0])

    def _evaluate(
        self, model: str, arguments: dict[str, Any], *more: str
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Run lm-eval to its end and read what it wrote; TesseraError, with its last line, where it fails."""
        with tempfile.TemporaryDirectory(prefix="tessera-lm-eval-") as out:
            command = [self._python, "-m", "lm_eval", "--model", model, "--tasks", self._tasks]
            command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
            command += ["--log_samples", "--output_path", out, *more]
            command += ["--limit", str(self._options.limit)] if self._options.limit is not None else []
            command += ["--include_path", str(self._folder)] if self._folder is not None else []
            key = os.environ.get("TESSERA_API_KEY")
            environment = {"OPENAI_API_KEY": key} if key else {}
            ended = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                cwd=self._folder,
                env=os.environ | environment,
            )
            if ended.returncode != 0:
                last = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
                raise TesseraError(f"lm-eval ended with exit code {ended.returncode}; it wrote last: {last:.300}")
            return metrics_of(read_scores(Path(out)))

    def _row(self, target: Target, subject: Subject, status: Any, **more: Any) -> Record:
        limit = self._options.limit
        conditions = Conditions(
            model=target.name,
            dtype=target.dtype,
            device=target.device,
            seed=self.config.model.seed,
            warmup="none",
            cache="off" if not self.config.cache.enable_prefix_caching or subject.engine != "tessera" else "cold",
            settings={"lm_eval": self._version, "concurrency": CONCURRENCY if subject.engine == "tessera" else 1},
        )
        return Record(
            kind=self.kind,
            case={"model": target.name, "dtype": target.dtype, "lm_eval": self._tasks, "limit": limit},
            subject=subject,
            status=status,
            conditions=conditions,
            provenance=self._provenance,
            **more,
        )

    def _is_done(self, target: Target, subject: Subject, done: Container[Done]) -> bool:
        row = self._row(target, subject, "failed", reason="not run")
        return Done(row.case_key, subject.label, 0) in done


def _backend_flags(wanted: Wanted) -> list[str]:
    return [word for name, value in wanted.settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def _version_of(python: str) -> str:
    """Of lm-eval in an environment; ConfigError where it has none."""
    try:
        asked = subprocess.run([python, "-c", _FIND], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"--lm-eval-python {python} cannot be run: {error}", "give a Python interpreter") from None
    if asked.returncode != 0:
        raise ConfigError(f"lm-eval is not installed for {python}", PIP)
    return asked.stdout.strip()
