"""What every request passes: keys, origin, size of the body, and the log, which holds no content."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vita_audio.serving.config import LOOPBACK
from vita_audio.serving.errors import ApiError, draining
from vita_audio.serving.service import Service

_logger = logging.getLogger("vita_audio.serving")

PUBLIC = ("/health", "/metrics", "/")
"""Addresses that need no key, besides the page's files."""

POLICY_VIOLATION = 1008
"""Websocket code of a refused connection."""


class Guard:
    """ASGI middleware around the whole application. It puts the accepted API key, or "", into the scope.

    Args:
        app: the application.
        service: its limits and state are used.
        keys: accepted API keys; none: no key is needed.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str] = ()):
        self._app = app
        self._service = service
        self._keys = [_digest(key) for key in keys]
        self._origins = set(service.options.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        limited = _Limited(receive, self._service.options.body_bytes)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "websocket.accept":
                status = 101
            await send(message)

        try:
            self._check(scope)
            is_work = scope["type"] == "http" and not _is_public(scope)
            with self._service.work() if is_work else nullcontext():
                await self._app(scope, limited, watched)
        except ApiError as error:
            status = error.status
            if scope["type"] == "http":
                await error.response()(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message})
        finally:
            place = scope["path"] if self._is_known(scope) else "other"
            self._service.metrics.requests.labels(place, status).inc()
            seconds = time.perf_counter() - began
            _logger.info("%s %s %d %.3f s", scope.get("method", "WEBSOCKET"), place, status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_origin(headers)
        if _is_public(scope):
            return
        scope["api_key"] = key_of(headers) if self._keys else ""
        if self._keys and not self._is_accepted(scope["api_key"]):
            raise ApiError("the API key is missing or wrong", None, 401, "invalid_api_key")
        if self._service.draining:
            raise draining()
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._service.options.body_bytes:
            raise too_large(self._service.options.body_bytes)

    def _check_origin(self, headers: Headers) -> None:
        """Refuse pages of other sites, which a browser would otherwise let reach a server on its own machine.

        Raises:
            ApiError: the page is of a site that is not allowed.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._service.options.on_loopback and _hostname(f"//{host}") not in LOOPBACK:
            raise ApiError("the Host header names another machine", None, 403, "forbidden_host")
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc != host:
            raise ApiError("pages of this origin may not use the server", None, 403, "forbidden_origin")

    def _is_accepted(self, key: str) -> bool:
        digest = _digest(key)
        # All are compared, in constant time, so that no timing tells about a key.
        return sum(hmac.compare_digest(digest, known) for known in self._keys) > 0

    def _is_known(self, scope: Scope) -> bool:
        """Whether the address is one of the server's; anything else would fill the metrics and the log."""
        return "route" in scope or "endpoint" in scope


class _Limited:
    """Receives a body, and refuses one that is too large although its header does not say so."""

    def __init__(self, receive: Receive, most: int):
        self._receive = receive
        self._most = most
        self._received = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > self._most:
            raise too_large(self._most)
        return message


def _is_public(scope: Scope) -> bool:
    """Whether the address needs no key and is answered at any time."""
    path = scope["path"]
    return scope.get("method") == "OPTIONS" or path in PUBLIC or path.startswith("/page/")


def key_of(headers: Headers) -> str:
    """The API key of a request; browsers, which cannot set headers of a websocket, send it as a subprotocol."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    protocols = [one.strip() for one in headers.get("sec-websocket-protocol", "").split(",")]
    prefix = "openai-insecure-api-key."
    return next((one.removeprefix(prefix) for one in protocols if one.startswith(prefix)), "")


def too_large(most: int) -> ApiError:
    """The body is larger than ``most`` bytes."""
    return ApiError(f"the body is larger than {most / 1e6:g} MB", None, 413, "body_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
