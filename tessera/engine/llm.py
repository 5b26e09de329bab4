"""Offline generation: the engine in the caller's process, shaped like vLLM's `LLM`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence as Items
from typing import Any

from tqdm import tqdm

from tessera.engine.build import build_engine
from tessera.engine.garbage import keep_what_is_there
from tessera.engine.keywords import config_of, keywords_for_flags
from tessera.engine.prompts import Prompt as Prompt
from tessera.engine.prompts import each_conversation, each_prompt, params_for, read_prompt
from tessera.environment import check_environment
from tessera.model.source import find_model
from tessera.text.request_text import RequestText
from tessera.text.tokenizer import Tokenizer, load_tokenizer
from tessera.types import EngineInfo, EngineStatus, Request, RequestOutput, SamplingParams


class LLM:
    """A model that answers lists of prompts.

    Settings are those of `tessera serve`, as keywords (`LLM("folder", dtype="float32", page_size=16)`); an
    unknown one raises ConfigError. Raises TesseraError where the model cannot be loaded.

    Threads may share it: calls of `generate` and `chat` are served one after the other.
    """

    @keywords_for_flags()
    def __init__(self, model: str | None = None, *, progress: bool = False, **settings: Any) -> None:
        check_environment()
        config = config_of({"model": model, **settings})
        self._engine = build_engine(config, progress=progress)
        self._tokenizer = load_tokenizer(find_model(config.model), config.model)
        self._ids = itertools.count()
        self._lock = threading.Lock()

    @property
    def info(self) -> EngineInfo:
        """What was loaded, and which attention backend serves each phase."""
        return self._engine.info

    @property
    def status(self) -> EngineStatus:
        """Counters: pages, preemptions, tokens."""
        return self._engine.status()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @keywords_for_flags()
    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; the results stand in the order of the prompts.

        `sampling_params` is one for all or one a prompt. RequestError, before anything is computed, where
        a prompt cannot be served. A call from another thread waits until this one has its results.
        """
        places = each_prompt(prompts)
        params = params_for(len(places), sampling_params)
        texts = [self._start(prompt, place, each) for (place, prompt), each in zip(places, params)]
        with self._lock:
            try:
                for text in texts:
                    self._engine.add(text.request)
                self._run({text.request.request_id: text for text in texts}, use_tqdm)
            except BaseException:  # Ctrl-C included: the next call must find an idle engine
                for text in texts:
                    self._engine.abort(text.request.request_id)
                raise
        return [text.result() for text in texts]

    @keywords_for_flags()
    def chat(
        self,
        messages: Items[dict[str, Any]] | Items[Items[dict[str, Any]]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template.

        RequestError, before anything is computed, where a message cannot be taken; threads wait as in `generate`.
        """
        prompts: list[Prompt] = []
        for conversation in each_conversation(messages):
            text = self._tokenizer.render_chat(conversation, add_generation_prompt=add_generation_prompt)
            token_ids = self._tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt": text, "prompt_token_ids": token_ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _start(self, prompt: object, place: str, params: SamplingParams) -> RequestText:
        text, token_ids = read_prompt(prompt, place, self._tokenizer)
        return RequestText(Request(str(next(self._ids)), token_ids, params), self._tokenizer, text)

    def _run(self, texts: dict[str, RequestText], use_tqdm: bool) -> None:
        with keep_what_is_there(), tqdm(total=len(texts), desc="requests", unit="req", disable=not use_tqdm) as bar:
            while self._engine.has_work:
                for output in self._engine.step():
                    text = texts[output.request_id]
                    delta = text.gather(output)
                    if delta is None or delta.finish_reason is None:
                        continue
                    if delta.abort:
                        self._engine.abort(output.request_id, output.index)
                    if text.finished:
                        bar.update()
