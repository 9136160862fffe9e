"""The door of a cluster: an ASGI application that passes each request to one of several servers.

A request keeps its replica by a lease that is open as long as the request or conversation is, so whoever hands out the
leases knows what each replica has to do. Sound does not pass through the machinery of the cluster: the gateway connects
to the replica's own address.

If a replica dies, its conversations and streams get an ``error`` event that says so. A request of which nothing was
answered yet goes to another replica: replies have no effect but themselves, so that nobody can tell.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import quote

import aiohttp
from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from vita_audio.serving.config import ServeOptions
from vita_audio.serving.errors import ApiError, client_left
from vita_audio.serving.guard import POLICY_VIOLATION, key_of, too_large
from vita_audio.serving.metrics import PROMETHEUS, joined_pages
from vita_audio.serving.realtime import new_id
from vita_audio.serving.responses import sse, while_connected
from vita_audio.serving.sessions import Sessions

Lease = Callable[[str], AbstractAsyncContextManager[str]]
"""Chooses a replica for a session (empty: none) and yields its address; it is the session's until the context ends."""

SESSION_HEADER = "x-session-id"
"""Requests with the same value go to the same replica, as long as it is there."""

_TRIES = 5
_PAUSE_SECONDS = 0.2
_HEARTBEAT_SECONDS = 10
_INTERNAL_ERROR = 1011
_TRY_AGAIN_LATER = 1013
_ABNORMAL = (None, 1006)
# These belong to one connection, not to the message (RFC 9110, 7.6.1), or are made again for the second one.
_OWN_HEADERS = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
}  # fmt: skip


class ReplicaLost(Exception):
    """The replica died before it answered anything."""


class Gateway:
    """Passes requests on.

    Args:
        lease: chooses replicas.
        options: those of the servers. Their limit on connections of a key holds for all of them together; the
            largest body is also what is kept of a request until its answer begins.
        metrics: Prometheus' page of each replica, by the replica's name.
    """

    def __init__(
        self,
        lease: Lease,
        options: ServeOptions,
        metrics: Callable[[], Awaitable[Mapping[str, str]]] | None = None,
    ):
        self._lease = lease
        self._body_bytes = options.body_bytes
        self._has_keys = options.api_key_file is not None
        self._sessions = Sessions(options.sessions_per_key)
        self._metrics = metrics
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await self._converse(scope, receive, send)
        elif scope["path"] == "/metrics" and self._metrics is not None:
            page = joined_pages(await self._metrics())
            await Response(page, headers={"Content-Type": PROMETHEUS})(scope, receive, send)
        else:
            try:
                body = await self._read(receive)
                await while_connected(Request(scope, receive), self._answer(scope, body, send))
            except ApiError as error:
                await error.response()(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """The connections to the replicas are made in the loop that serves, and closed at the end."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown" and self._client is not None:
                await self._client.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    @property
    def _connections(self) -> aiohttp.ClientSession:
        if self._client is None:
            patience = aiohttp.ClientTimeout(total=None, sock_connect=5)
            unlimited = aiohttp.TCPConnector(limit=0)
            self._client = aiohttp.ClientSession(
                connector=unlimited,
                timeout=patience,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._client

    # -- HTTP -------------------------------------------------------------------------------------------------

    async def _read(self, receive: Receive) -> bytes:
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise client_left()
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self._body_bytes:
                raise too_large(self._body_bytes)
            if not message.get("more_body", False):
                return b"".join(pieces)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        for _ in range(_TRIES):
            try:
                async with self._lease(_session(scope)) as address:
                    await self._relay(address, scope, body, send)
                    return
            except ReplicaLost:
                await asyncio.sleep(_PAUSE_SECONDS)
        raise _lost()

    async def _relay(self, address: str, scope: Scope, body: bytes, send: Send) -> None:
        """Pass one request on, and its answer back.

        Raises:
            ReplicaLost: there is no answer.
        """
        is_begun, is_stream = False, False
        try:
            async with self._connections.request(
                scope["method"], _url(address, scope), headers=_passed_on(scope), data=body or None,
                allow_redirects=False,
            ) as response:  # fmt: skip
                headers = [
                    (name, value) for name, value in response.raw_headers if name.lower() not in _OWN_HEADERS
                ]
                await send({"type": "http.response.start", "status": response.status, "headers": headers})
                is_begun, is_stream = True, response.content_type == "text/event-stream"
                async for piece in response.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, ConnectionError) as error:
            if not is_begun:
                raise ReplicaLost from error
            if not is_stream:
                raise  # a file that ends too early must not look complete
            await send(
                {"type": "http.response.body", "body": sse({"error": _lost().to_dict()}), "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    # -- websockets -------------------------------------------------------------------------------------------

    async def _converse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        refusal = _lost()
        # A wrong key is counted too, as itself; the replica refuses it.
        key = key_of(Headers(scope=scope)) if self._has_keys else ""
        try:
            with self._sessions.opened(key):
                for _ in range(_TRIES):
                    try:
                        async with self._lease(_session(scope)) as address:
                            if await self._connect(address, scope, receive, send):
                                return
                    except ReplicaLost:
                        await asyncio.sleep(_PAUSE_SECONDS)
        except ApiError as error:
            refusal = error
        await send({"type": "websocket.accept"})
        await send(_error_event(refusal))
        await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER})

    async def _connect(self, address: str, scope: Scope, receive: Receive, send: Send) -> bool:
        """Hold one conversation. False: the replica could not be reached."""
        try:
            upstream = await self._connections.ws_connect(
                _url(address, scope).replace("http", "ws", 1), headers=_passed_on(scope),
                protocols=scope.get("subprotocols", ()), heartbeat=_HEARTBEAT_SECONDS, max_msg_size=0,
            )  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": error.message})
            return True
        except (aiohttp.ClientError, ConnectionError):
            return False
        async with upstream:
            await send({"type": "websocket.accept", "subprotocol": upstream.protocol})
            up = asyncio.create_task(_pass_up(upstream, receive))
            down = asyncio.create_task(_pass_down(upstream, send))
            try:
                await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
                if up.done():  # the client left
                    return True
                if upstream.close_code in _ABNORMAL:
                    await send(_error_event(_lost()))
                code = _INTERNAL_ERROR if upstream.close_code in _ABNORMAL else upstream.close_code
                await send({"type": "websocket.close", "code": code})
                return True
            finally:
                for task in (up, down):
                    task.cancel()
                await asyncio.gather(up, down, return_exceptions=True)


async def _pass_up(upstream: aiohttp.ClientWebSocketResponse, receive: Receive) -> None:
    """What the client says, until it leaves."""
    while (message := await receive())["type"] != "websocket.disconnect":
        try:
            if message.get("text") is not None:
                await upstream.send_str(message["text"])
            else:
                await upstream.send_bytes(message.get("bytes") or b"")
        except (aiohttp.ClientError, ConnectionError):
            await asyncio.Event().wait()  # the other direction tells that the replica is gone


async def _pass_down(upstream: aiohttp.ClientWebSocketResponse, send: Send) -> None:
    """What the replica says, until it ends."""
    async for message in upstream:
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})


def _session(scope: Scope) -> str:
    return Headers(scope=scope).get(SESSION_HEADER, "")


def _url(address: str, scope: Scope) -> Any:
    path = scope.get("raw_path") or quote(scope["path"]).encode()
    query = scope.get("query_string", b"")
    return address + (path + b"?" + query if query else path).decode("latin-1")


def _passed_on(scope: Scope) -> list[tuple[str, str]]:
    """The client's headers, without those of its connection."""
    return [
        (name.decode("latin-1"), value.decode("latin-1"))
        for name, value in scope["headers"]
        if name not in _OWN_HEADERS and name != b"content-length" and not name.startswith(b"sec-websocket-")
    ]


def _lost() -> ApiError:
    message = "the replica that held this conversation or request is gone; begin it again"
    return ApiError(message, None, 503, "replica_lost", retry_after=1)


def _error_event(error: ApiError) -> dict[str, Any]:
    event = {"type": "error", "event_id": new_id("event"), "error": error.to_dict() | {"event_id": None}}
    return {"type": "websocket.send", "text": json.dumps(event)}
