"""The key at the door."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from tessera.server.errors import plain_error

OPEN_PATHS = ("/health",)


class RequireKey:
    """Lets a request through only with `Authorization: Bearer KEY`, whatever its route, known or not.

    The path is ASGI's own, never one rebuilt from the Host header, which the client writes.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 401 (ASGI)."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
                refusal = plain_error(
                    401,
                    "a valid API key is needed: send the header `Authorization: Bearer KEY`",
                    "invalid_api_key",
                    {"www-authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)
