"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM has them and lm-eval probes them."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from tessera.errors import RequestError
from tessera.server.chat import render
from tessera.server.errors import json_response
from tessera.server.replies import Detokenized, Tokens
from tessera.server.schema import DetokenizeBody, TokenizeBody, parse_body
from tessera.server.service import Service, read_body


async def tokenize(request: HttpRequest) -> Response:
    """The token ids of a text, or of a conversation as the template writes it."""
    service: Service = request.app.state.service
    raw = await read_body(request)
    return json_response(await service.prepare(len(raw), lambda: _tokens(raw, service)))


def _tokens(raw: bytes, service: Service) -> Tokens:
    body = parse_body(raw, TokenizeBody)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("exactly one of prompt and messages is needed", param="prompt")
    text = body.prompt
    if text is None:
        text = render(service, body.messages or [], add_generation_prompt=body.add_generation_prompt is not False)
    special = body.messages is None if body.add_special_tokens is None else body.add_special_tokens
    ids = service.encode(text, add_special_tokens=special)
    texts = [service.tokenizer.token_text(token_id) for token_id in ids] if body.return_token_strs else None
    return Tokens(len(ids), service.info.max_model_len, ids, texts)


async def detokenize(request: HttpRequest) -> Response:
    """The text of token ids, special tokens included."""
    service: Service = request.app.state.service
    raw = await read_body(request)
    return json_response(await service.prepare(len(raw), lambda: _text(raw, service)))


def _text(raw: bytes, service: Service) -> Detokenized:
    body = parse_body(raw, DetokenizeBody)
    service.check_model(body.model)
    for token_id in body.tokens:
        if not 0 <= token_id < service.info.vocab_size:
            raise RequestError(
                f"tokens has the id {token_id}, the vocabulary has 0 to {service.info.vocab_size - 1}", param="tokens"
            )
    return Detokenized(service.tokenizer.decode(body.tokens, skip_special_tokens=False))


async def tokenizer_info(request: HttpRequest) -> Response:
    """What a remote user of the tokenizer must know."""
    service: Service = request.app.state.service
    tokenizer = service.tokenizer
    return json_response(
        {
            "bos_token": None,
            "eos_token": None,
            "pad_token": None,
            **tokenizer.special_tokens,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "chat_template": tokenizer.template.source if tokenizer.template else None,
            "vocab_size": service.info.vocab_size,
            "max_model_len": service.info.max_model_len,
        }
    )
