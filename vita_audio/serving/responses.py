"""Responses that stream, and replies that end when their client leaves."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Send

from vita_audio.inference import Event, Reply
from vita_audio.serving.errors import ApiError, client_left, failure

Value = TypeVar("Value")


class Streamed(StreamingResponse):
    """A streaming response that closes its iterator, however it ends."""

    def __init__(self, content: AsyncGenerator[bytes, None], media_type: str):
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._content = content

    async def stream_response(self, send: Send) -> None:
        """See the base class."""
        async with aclosing(self._content):
            await super().stream_response(send)


async def begin(content: AsyncGenerator[bytes, None], media_type: str) -> Streamed:
    """A response whose first piece is ready, so that a request that cannot be answered gets a status of its own."""
    try:
        first = await anext(content)
    except StopAsyncIteration:
        first = b""
    return Streamed(_prepended(first, content), media_type)


async def _prepended(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(rest):
        yield first
        async for piece in rest:
            yield piece


async def server_sent(
    events: AsyncGenerator[dict[str, Any], None], end: bytes = b""
) -> AsyncGenerator[bytes, None]:
    """Events as server-sent events. A failure after the first event becomes an ``error`` event."""
    begun = False
    try:
        async with aclosing(events):
            async for event in events:
                yield sse(event)
                begun = True
    except Exception as error:
        if not begun:
            raise
        yield sse({"error": (error if isinstance(error, ApiError) else failure(error)).to_dict()})
        return
    yield end


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def whole(events: AsyncGenerator[Event, None]) -> Reply:
    """The reply at the end of a stream."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Reply):
                return event
    raise AssertionError("a stream ends with its reply")


async def while_connected(request: Request, answer: Coroutine[Any, Any, Value]) -> Value:
    """Await an answer; cancel it if the client leaves. The body must have been read.

    Raises:
        ApiError: the client left.
    """
    task = asyncio.ensure_future(answer)
    left = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise client_left()
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def from_base64(data: str, param: str) -> bytes:
    """The bytes of a field.

    Raises:
        ApiError: it is not base64.
    """
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"{param}: is not base64", param, code="invalid_value") from None


def to_base64(content: bytes) -> str:
    """Bytes as a field."""
    return base64.b64encode(content).decode("ascii")
