"""Offline generation: the engine in the caller's process, shaped like vLLM's `LLM`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items
from typing import Any

from tqdm import tqdm

from tessera.config import EngineConfig
from tessera.engine.build import build_engine
from tessera.engine.garbage import keep_what_is_there
from tessera.environment import check_environment
from tessera.errors import RequestError
from tessera.model.source import find_model
from tessera.text.request_text import RequestText
from tessera.text.tokenizer import Tokenizer, load_tokenizer
from tessera.types import EngineInfo, EngineStatus, Request, RequestOutput, SamplingParams

Prompt = str | list[int] | dict[str, Any]
"""Text, token ids, or vLLM's `{"prompt": ...}` and `{"prompt_token_ids": ...}`."""


class LLM:
    """A model that answers lists of prompts.

    Settings are those of `tessera serve`, as keywords (`LLM("folder", dtype="float32", page_size=16)`); an
    unknown one raises ConfigError. Raises TesseraError where the model cannot be loaded.
    """

    def __init__(self, model: str | None = None, *, progress: bool = False, **settings: Any) -> None:
        check_environment()
        config = EngineConfig.from_flat({"model": model, **settings})
        self._engine = build_engine(config, progress=progress)
        self._tokenizer = load_tokenizer(find_model(config.model), config.model)
        self._ids = itertools.count()

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

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt; the results stand in the order of the prompts.

        `sampling_params` is one for all or one a prompt. RequestError, before anything is computed, where
        a prompt cannot be served.
        """
        listed = _as_list(prompts)
        params = _params_for(listed, sampling_params)
        texts = [self._start(prompt, each) for prompt, each in zip(listed, params)]
        try:
            for text in texts:
                self._engine.add(text.request)
            self._run({text.request.request_id: text for text in texts}, use_tqdm)
        except BaseException:  # Ctrl-C included: the next call must find an idle engine
            for text in texts:
                self._engine.abort(text.request.request_id)
            raise
        return [text.result() for text in texts]

    def chat(
        self,
        messages: Items[dict[str, Any]] | Items[Items[dict[str, Any]]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template."""
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self._tokenizer.render_chat(list(conversation), add_generation_prompt=add_generation_prompt)
            prompts.append({"prompt": text, "prompt_token_ids": self._encode(text, special=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _start(self, prompt: Prompt, params: SamplingParams) -> RequestText:
        text, token_ids = self._tokenize(prompt)
        return RequestText(Request(str(next(self._ids)), token_ids, params), self._tokenizer, text)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._encode(prompt, special=True)
        if isinstance(prompt, list):
            return None, prompt
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise RequestError(
                f"a prompt has the keys {sorted(prompt)}, only prompt and prompt_token_ids are taken", param="prompt"
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None and not isinstance(text, str):
            raise RequestError(f"prompt must be text, got {text!r:.60}", param="prompt")
        return text, list(ids) if ids is not None else self._encode(str(text), special=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=special)

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


def _as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | dict) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(prompts: list[Prompt], params: SamplingParams | Items[SamplingParams] | None) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(
            f"{len(prompts)} prompts were given and {len(params)} sampling_params", "give one for all or one a prompt"
        )
    return list(params)
