"""The routes, and the promise that every error is answered in OpenAI's shape."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from tessera import __version__
from tessera.errors import TesseraError
from tessera.server import metrics
from tessera.server.auth import RequireKey
from tessera.server.chat import create_chat_completion
from tessera.server.completions import create_completion
from tessera.server.errors import client_gone, json_response, on_tessera_error, on_unexpected, plain_error
from tessera.server.replies import ModelCard, ModelList
from tessera.server.service import Service
from tessera.server.tokens import detokenize, tokenize, tokenizer_info


def build_app(service: Service, api_key: str | None = None) -> Starlette:
    """The ASGI application that serves `service`, behind `api_key` where there is one."""
    routes = [
        Route("/v1/completions", create_completion, methods=["POST"]),  # first, for they are looked at in this order
        Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
        Route("/", root),
        Route("/health", health),
        Route("/version", version),
        Route("/metrics", prometheus),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/attention", attention),
        Route("/v1/status", status),
    ]
    paths = frozenset(route.path for route in routes if "{" not in route.path)
    around = [Middleware(metrics.CountResponses, latency=service.client.latency, paths=paths)]
    if api_key is not None:
        around.append(Middleware(RequireKey, key=api_key))
    handlers: dict[Any, Any] = {
        TesseraError: on_tessera_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
        Exception: on_unexpected,
    }
    app = Starlette(routes=routes, middleware=around, exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def on_disconnect(_request: HttpRequest, _error: Exception) -> Response:
    """Starlette's handler for a client that leaves while it sends: nobody is there to read the answer."""
    return client_gone()


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    """Starlette's handler for unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    messages = {404: f"there is no {path!r:.200} here", 405: f"{path} does not take {request.method}"}
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = messages.get(error.status_code, error.detail)
    return plain_error(error.status_code, message, codes.get(error.status_code), error.headers)


async def root(_request: HttpRequest) -> Response:
    """What this is."""
    return json_response({"name": "tessera", "version": __version__, "api": "/v1"})


async def version(_request: HttpRequest) -> Response:
    """The version of tessera."""
    return json_response({"version": __version__})


async def health(request: HttpRequest) -> Response:
    """200 while the engine answers, else 503 and why; the engine itself is not asked, so this never waits."""
    problem = request.app.state.service.client.problem()
    if problem:
        return plain_error(503, problem, "engine_unavailable", {"retry-after": "1"})
    return json_response({"status": "ok"})


async def prometheus(request: HttpRequest) -> Response:
    """Counters and latencies for Prometheus."""
    return Response(metrics.render(request.app.state.service.client), media_type=metrics.MEDIA_TYPE)


async def models(request: HttpRequest) -> Response:
    """The one model that is served."""
    return json_response(ModelList([_card(request.app.state.service)]))


async def model(request: HttpRequest) -> Response:
    """One model by its name."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["name"])
    return json_response(_card(service))


async def attention(request: HttpRequest) -> Response:
    """Which backend serves each phase, why, and every reason against the others."""
    info = request.app.state.service.info
    return json_response(
        {
            "model": info.model,
            "device": info.device,
            "dtype": info.dtype,
            "num_four_bit_layers": info.num_four_bit_layers,
            "page_size": info.page_size,
            "phases": {choice.phase: choice for choice in info.attention},
        }
    )


async def status(request: HttpRequest) -> Response:
    """What the engine is and its counters as they were when it last spoke."""
    service: Service = request.app.state.service
    counters = msgspec.to_builtins(service.client.status)
    return json_response({"engine": service.info, "status": counters | {"pages_used_peak": service.client.peak_pages}})


def _card(service: Service) -> ModelCard:
    return ModelCard(service.info.model, service.created, service.info.max_model_len)
