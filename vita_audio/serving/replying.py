"""The replies of a realtime connection: one at a time, each in a task of its own, as OpenAI's events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

from fastapi import WebSocketDisconnect

from vita_audio.inference import AudioChunk, Reply, Request, TextDelta
from vita_audio.serving import realtime_fields as fields
from vita_audio.serving.errors import ApiError, failure
from vita_audio.serving.responses import to_base64, whole
from vita_audio.serving.service import Service
from vita_audio.serving.sounds import SoundEncoder
from vita_audio.serving.speech import usage
from vita_audio.serving.turns import Dialogue, Item

Why = Literal["turn_detected", "client_cancelled"]


class Send(Protocol):
    """Sends an event."""

    def __call__(self, kind: str, **content: Any) -> Awaitable[None]: ...


@dataclass
class _Response:
    """A reply that runs."""

    item: Item
    speaks: bool
    options: dict[str, Any]
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex[:24]}")
    silent: bool = False
    cancelled: Why | None = None
    task: asyncio.Task[None] | None = None

    @property
    def place(self) -> dict[str, Any]:
        """Where in the response its only part is."""
        return {"response_id": self.id, "item_id": self.item.id, "output_index": 0, "content_index": 0}


class Replies:
    """Starts and ends the replies of one connection.

    Args:
        service: generates them.
        dialogue: the history.
        send: sends an event to the client.
    """

    def __init__(self, service: Service, dialogue: Dialogue, send: Send):
        self._service = service
        self._dialogue = dialogue
        self._send = send
        self._current: _Response | None = None
        self._transcriptions: set[asyncio.Task[None]] = set()

    @property
    def item(self) -> Item | None:
        """The item of the reply that runs."""
        return None if self._current is None else self._current.item

    async def start(self, settings: fields.Session, transcribe: bool) -> None:
        """Begin a reply to the conversation so far. From now on the server waits for its end before it ends itself.

        Args:
            settings: of the session, and of this response.
            transcribe: write the last item's speech down afterwards.

        Raises:
            ApiError: a reply runs already, or the server is draining.
        """
        if self._current is not None:
            raise ApiError(
                "a reply is running; cancel it first", code="conversation_already_has_active_response"
            )
        work = ExitStack()
        work.enter_context(self._service.work())
        asked = self._dialogue.items[-1] if self._dialogue.items else None
        item = self._dialogue.add_reply(f"item_{uuid.uuid4().hex[:24]}")
        speaks = settings.output_modalities == ["audio"]
        shown = {
            "output_modalities": settings.output_modalities,
            "max_output_tokens": settings.max_output_tokens,
        }
        response = self._current = _Response(item, speaks, shown)
        response.task = asyncio.create_task(self._run(response, settings))
        response.task.add_done_callback(lambda _: work.close())
        if transcribe and asked is not None:
            self.transcribe_later(asked)

    def silence(self) -> None:
        """Send nothing more of the reply that runs; :meth:`cancel` follows."""
        if self._current is not None:
            self._current.silent = True

    async def cancel(self, why: Why, response_id: str | None = None) -> bool:
        """End the reply that runs. Returns when its row is free; False if there is none, or another one."""
        response = self._current
        if response is None or response_id not in (None, response.id) or response.task is None:
            return False
        response.silent, response.cancelled = True, why
        response.task.cancel()
        with suppress(asyncio.CancelledError):
            await response.task
        if self._current is response:  # it had not begun
            self._current = None
        return True

    async def close(self) -> None:
        """End everything; nothing is sent any more."""
        tasks = [*self._transcriptions]
        if self._current is not None and self._current.task is not None:
            tasks.append(self._current.task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def transcribe_later(self, item: Item) -> None:
        """Write an item's speech down once no reply runs."""
        task = asyncio.create_task(self._transcribe(item))
        self._transcriptions.add(task)
        task.add_done_callback(self._transcriptions.discard)

    async def _run(self, response: _Response, settings: fields.Session) -> None:
        reply: Reply | None = None
        status: dict[str, Any] = {}
        prompt_tokens = 0
        try:
            await self._open(response)
            request = await asyncio.to_thread(self._request, response, settings)
            prompt_tokens = len(request.prompt)
            reply = await self._stream(response, request)
        except asyncio.CancelledError:
            if response.cancelled is None:  # the connection ends
                raise
            if response.speaks:  # tokens whose sound was not sent are no part of the conversation
                self._dialogue.cut(response.item, int(1000 * response.item.seconds))
        except ApiError as error:
            status = {
                "type": "failed",
                "error": {"type": error.type, "code": error.code, "message": error.message},
            }
        except WebSocketDisconnect:
            self._current = None
            return
        except Exception as error:
            status = {"type": "failed", "error": {"type": "server_error", "message": failure(error).message}}
        self._current = None
        with suppress(WebSocketDisconnect):
            await self._close(response, reply, status, prompt_tokens)

    def _request(self, response: _Response, settings: fields.Session) -> Request:
        most = None if settings.max_output_tokens == "inf" else settings.max_output_tokens
        options = settings.options(self._service.options.new_tokens, most)
        request = self._dialogue.request(response.item, options, "streamed" if response.speaks else "none")
        return self._service.fitted(request, "conversation")

    async def _open(self, response: _Response) -> None:
        shown = self._shown(response, "in_progress")
        await self._send("response.created", response=shown)
        item = _item(response.item, "in_progress", [])
        previous = self._dialogue.items.index(response.item) - 1
        previous_id = self._dialogue.items[previous].id if previous >= 0 else None
        place = {"response_id": response.id, "output_index": 0}
        await self._send("response.output_item.added", item=item, **place)
        await self._send("conversation.item.added", item=item, previous_item_id=previous_id)
        part = {"type": "audio", "transcript": ""} if response.speaks else {"type": "text", "text": ""}
        await self._send("response.content_part.added", part=part, **response.place)

    async def _stream(self, response: _Response, request: Request) -> Reply | None:
        item = response.item
        encoder = SoundEncoder(self._service.pipeline.codec.sample_rate, "pcm")
        stream = partial(self._dialogue.stream, item, request)
        async with aclosing(self._service.events(stream)) as events:
            async for event in events:
                if response.silent:
                    return None
                if isinstance(event, TextDelta):
                    item.text += event.text
                    kind = "output_audio_transcript" if response.speaks else "output_text"
                    await self._send(f"response.{kind}.delta", delta=event.text, **response.place)
                elif isinstance(event, AudioChunk):
                    await self._sound(response, encoder.push(event.samples))
                elif isinstance(event, Reply):
                    if response.speaks and event.waveform is not None:
                        await self._sound(response, encoder.push(event.waveform[:0], last=True))
                    return event
        return None

    async def _sound(self, response: _Response, pcm: bytes) -> None:
        if pcm:
            if response.item.begun is None:
                response.item.begun = time.perf_counter()
            await self._send("response.output_audio.delta", delta=to_base64(pcm), **response.place)

    async def _close(
        self, response: _Response, reply: Reply | None, status: dict[str, Any], prompt_tokens: int
    ) -> None:
        item, place = response.item, response.place
        if response.cancelled is not None:
            status = {"type": "cancelled", "reason": response.cancelled}
        elif reply is not None and reply.timings.new_tokens == len(reply.token_ids):
            status = {"type": "incomplete", "reason": "max_output_tokens"}
        if response.speaks:
            await self._send("response.output_audio.done", **place)
            await self._send("response.output_audio_transcript.done", transcript=item.text, **place)
            part = {"type": "audio", "transcript": item.text}
            content = {"type": "output_audio", "transcript": item.text}
        else:
            await self._send("response.output_text.done", text=item.text, **place)
            part, content = {"type": "text", "text": item.text}, {"type": "output_text", "text": item.text}
        await self._send("response.content_part.done", part=part, **place)
        ended = "completed" if status.get("type", "completed") == "completed" else "incomplete"
        shown_item = _item(item, ended, [content])
        await self._send(
            "response.output_item.done", item=shown_item, response_id=response.id, output_index=0
        )
        await self._send("conversation.item.done", item=shown_item, previous_item_id=None)
        shown = self._shown(response, status.get("type", "completed"))
        shown |= {"output": [shown_item], "status_details": status or None}
        if prompt_tokens:
            shown["usage"] = usage(
                prompt_tokens, len(item.reply or []) if reply is None else reply.timings.new_tokens
            )
        await self._send("response.done", response=shown)

    def _shown(self, response: _Response, status: str) -> dict[str, Any]:
        head = {"id": response.id, "object": "realtime.response", "status": status, "output": []}
        return head | response.options

    async def _transcribe(self, item: Item) -> None:
        if item.speech is None:
            return
        kind, place = "conversation.item.input_audio_transcription", {"item_id": item.id, "content_index": 0}
        try:
            with self._service.work():
                current = self._current
                if current is not None and current.task is not None:
                    await asyncio.wait([current.task])
                prompt = await asyncio.to_thread(self._dialogue.transcription, item.speech)
                options = fields.Session(temperature=0).options(self._service.options.new_tokens)
                request = self._service.fitted(Request(prompt, options, "none"), "conversation")
                reply = await whole(self._service.reply(request))
                item.text = reply.text.strip()
                used = {"type": "tokens"} | usage(len(prompt), reply.timings.new_tokens)
                with suppress(WebSocketDisconnect):
                    await self._send(f"{kind}.completed", transcript=item.text, usage=used, **place)
        except ApiError as error:
            with suppress(WebSocketDisconnect):
                await self._send(f"{kind}.failed", error=error.to_dict(), **place)


def _item(item: Item, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    head = {"id": item.id, "object": "realtime.item", "type": "message", "role": "assistant"}
    return head | {"status": status, "content": content}
