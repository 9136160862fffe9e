"""``/v1/realtime``: a conversation over a websocket, in OpenAI's events.

One task receives the client's events and handles them in order; a reply runs in a task of its own, so the user can
interrupt it. When the server hears the user speak, no sound is sent from that moment on, and the history is cut to what
can have been heard by then; a client that knows better cuts further with ``conversation.item.truncate``.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from vita_audio.serving import realtime_fields as fields
from vita_audio.serving.errors import ApiError, failure, invalid
from vita_audio.serving.fields import check, voice_name
from vita_audio.serving.listening import Detection, Heard, Listener, Speech
from vita_audio.serving.replying import Replies
from vita_audio.serving.responses import from_base64
from vita_audio.serving.service import Service
from vita_audio.serving.sounds import from_pcm
from vita_audio.serving.speech import check_text
from vita_audio.serving.turns import Dialogue, Item

MOST_ITEMS = 1024
"""Items of one conversation."""


async def converse(service: Service, socket: WebSocket) -> None:
    """Serve one connection until it ends."""
    offered = socket.headers.get("sec-websocket-protocol", "")
    protocol = "realtime" if "realtime" in [name.strip() for name in offered.split(",")] else None
    connection = Connection(service, socket)
    try:
        await socket.accept(protocol)
        with service.session_of(socket.scope["api_key"]):
            async with aclosing(connection), asyncio.timeout(service.options.session_seconds):
                await connection.run()
    except ApiError as error:
        await connection.say_error(error)
    except TimeoutError:
        await connection.say_error(ApiError("the connection was open for too long", code="session_expired"))
    except WebSocketDisconnect:
        pass
    finally:
        with suppress(RuntimeError, OSError, WebSocketDisconnect):  # the client closed it already
            await socket.close()


class Connection:
    """The state of one connection.

    Args:
        service: answers.
        socket: an accepted websocket.
    """

    def __init__(self, service: Service, socket: WebSocket):
        self._service = service
        self._socket = socket
        self._id = f"sess_{uuid.uuid4().hex}"
        self._expires = int(time.time() + service.options.session_seconds)
        self._dialogue = Dialogue(service.pipeline)
        self._settings = fields.Session(model=service.name)
        self._listener = self._new_listener()
        self._next_speech = new_id("item")
        self._replies = Replies(service, self._dialogue, self.send)
        self._handlers: dict[type[Any], Callable[[Any], Awaitable[None]]] = {
            fields.SessionUpdate: self._update,
            fields.BufferAppend: self._append,
            fields.BufferCommit: self._commit,
            fields.BufferClear: self._clear,
            fields.ItemCreate: self._create_item,
            fields.ItemTruncate: self._truncate,
            fields.ItemDelete: self._delete_item,
            fields.ItemRetrieve: self._retrieve_item,
            fields.ResponseCreate: self._create_response,
            fields.ResponseCancel: self._cancel_response,
        }

    async def run(self) -> None:
        """Handle events until the client leaves or is idle for too long."""
        await self._apply(self._settings)
        await self.send("session.created", session=self._shown_session())
        while True:
            try:
                async with asyncio.timeout(self._service.options.idle_seconds):
                    text = await self._receive()
            except TimeoutError:
                await self.say_error(ApiError("the connection was idle for too long", code="idle_timeout"))
                return
            await self._handle(text)

    async def aclose(self) -> None:
        """End what runs and free the caches."""
        await self._replies.close()
        self._dialogue.close()

    async def send(self, kind: str, **content: Any) -> None:
        """Send an event."""
        try:
            await self._socket.send_json({"type": kind, "event_id": new_id("event"), **content})
        except (RuntimeError, OSError) as error:  # the client left, or the connection is closed already
            raise WebSocketDisconnect(1006) from error

    async def say_error(self, error: ApiError, event_id: str | None = None) -> None:
        """Send an ``error`` event, if the client is still there."""
        with suppress(WebSocketDisconnect):
            await self.send("error", error=error.to_dict() | {"event_id": event_id})

    async def _receive(self) -> str | bytes:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        content: str | bytes | None = message.get("text")
        return message.get("bytes") or b"" if content is None else content

    async def _handle(self, content: str | bytes) -> None:
        event_id: str | None = None
        try:
            try:
                event = fields.EVENTS.validate_json(content)
            except ValidationError as error:
                raise _unknown_event(error) from None
            event_id = event.event_id
            await self._handlers[type(event)](event)
        except ApiError as error:
            await self.say_error(error, event_id)
        except WebSocketDisconnect:
            raise
        except ValueError as error:
            await self.say_error(ApiError(str(error).splitlines()[0], code="invalid_value"), event_id)
        except Exception as error:
            await self.say_error(failure(error), event_id)

    # -- the session ------------------------------------------------------------------------------------------

    async def _update(self, event: fields.SessionUpdate) -> None:
        old = self._settings
        try:
            new = check(fields.Session, fields.merged(old.model_dump(), event.session))
        except ApiError as error:
            error.param = f"session.{error.param}" if error.param else "session"
            raise
        if new.model is not None:
            self._service.check_model(new.model)
        new.options(self._service.options.new_tokens)
        await self._apply(new)
        if new.audio.input.turn_detection != old.audio.input.turn_detection:
            self._listener = self._new_listener()
        await self.send("session.updated", session=self._shown_session())

    async def _apply(self, settings: fields.Session) -> None:
        """Use settings: what stands in front of the conversation follows from them."""
        if settings.instructions is not None:
            check_text(settings.instructions, "session.instructions", self._service)
        voice = self._service.voice(voice_name(settings.audio.output.voice), "session.audio.output.voice")
        given = settings.instructions
        system = self._service.pipeline.system_message() if given is None else given or None
        if voice is not None and given:
            message = "session.instructions: a voice takes their place; give only one"
            raise ApiError(message, "session.instructions", code="invalid_value")
        await asyncio.to_thread(self._dialogue.begin_with, system, voice)
        self._settings = settings

    def _new_listener(self) -> Listener:
        vad = self._settings.audio.input.turn_detection
        detect = None
        if vad is not None:
            detect = Detection(vad.threshold, vad.prefix_padding_ms, vad.silence_duration_ms)
        return Listener(self._service.pipeline.codec, self._service.options.audio_seconds, detect)

    def _shown_session(self) -> dict[str, Any]:
        return self._settings.model_dump() | {
            "id": self._id,
            "object": "realtime.session",
            "expires_at": self._expires,
        }

    # -- the user's sound -------------------------------------------------------------------------------------

    async def _append(self, event: fields.BufferAppend) -> None:
        pcm = from_base64(event.audio, "audio")
        if len(pcm) % 2:
            raise ApiError(
                "audio: 16-bit samples need an even number of bytes", "audio", code="invalid_value"
            )
        if self._listener.full:
            most = f"{self._service.options.audio_seconds:g} s"
            raise ApiError(
                f"audio: the buffer is full at {most}; commit or clear it", "audio", code="buffer_full"
            )
        if pcm:
            for heard in await asyncio.to_thread(self._listener.push, from_pcm(pcm)):
                await self._hear(heard)

    async def _hear(self, heard: Heard) -> None:
        vad = self._settings.audio.input.turn_detection
        assert vad is not None
        if heard.started is not None:
            if vad.interrupt_response:
                self._replies.silence()
            await self.send(
                "input_audio_buffer.speech_started", audio_start_ms=heard.started, item_id=self._next_speech
            )
            if vad.interrupt_response:
                await self._interrupt()
        else:
            await self.send(
                "input_audio_buffer.speech_stopped", audio_end_ms=heard.stopped, item_id=self._next_speech
            )
            if heard.speech is not None:
                await self._add_speech(heard.speech)
                if vad.create_response:
                    await self._replies.start(
                        self._settings, self._settings.audio.input.transcription is not None
                    )

    async def _interrupt(self) -> None:
        """The user speaks: end the reply, and forget what of it cannot have been heard."""
        last = self._dialogue.items[-1] if self._dialogue.items else None
        played = None if last is None or not last.playing else int(1000 * last.played_seconds)
        await self._replies.cancel("turn_detected")
        if last is not None and played is not None:
            self._dialogue.cut(last, played)
            await self.send(
                "conversation.item.truncated", item_id=last.id, content_index=0, audio_end_ms=played
            )

    async def _commit(self, event: fields.BufferCommit) -> None:
        speech = await asyncio.to_thread(self._listener.commit)
        if speech is None:
            raise ApiError("the buffer holds no sound", code="input_audio_buffer_commit_empty")
        await self._add_speech(speech)
        if self._settings.audio.input.transcription is not None:
            self._replies.transcribe_later(self._dialogue.items[-1])

    async def _add_speech(self, speech: Speech) -> None:
        item_id, self._next_speech = self._next_speech, new_id("item")
        previous = self._last_id()
        self._check_room()
        item = await asyncio.to_thread(self._dialogue.add, item_id, "user", "", speech)
        await self.send("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous)
        await self._say_added(item, previous)

    async def _clear(self, event: fields.BufferClear) -> None:
        self._listener.clear()
        await self.send("input_audio_buffer.cleared")

    # -- items ------------------------------------------------------------------------------------------------

    async def _create_item(self, event: fields.ItemCreate) -> None:
        given, after = event.item, event.previous_item_id
        item_id = given.id or new_id("item")
        self._check_room()
        if any(item.id == item_id for item in self._dialogue.items):
            raise ApiError(f"item.id: {item_id!r} is taken", "item.id", code="invalid_value")
        text, encoded = _read_content(given)
        check_text(text, "item.content", self._service)
        speech = None if encoded is None else await asyncio.to_thread(self._encode, encoded)
        try:
            item = await asyncio.to_thread(self._dialogue.add, item_id, given.role, text, speech, after)
        except KeyError:
            raise _no_item("previous_item_id", after) from None
        place = self._dialogue.index(item_id)
        await self._say_added(item, self._dialogue.items[place - 1].id if place else None)

    def _encode(self, pcm: bytes) -> Speech:
        listener = Listener(self._service.pipeline.codec, self._service.options.audio_seconds, None)
        listener.push(from_pcm(pcm[: len(pcm) // 2 * 2]))
        speech = listener.commit()
        if speech is None:
            raise ApiError("item.content: holds no sound", "item.content", code="invalid_audio")
        return speech

    async def _truncate(self, event: fields.ItemTruncate) -> None:
        item = self._item(event.item_id)
        if item.reply is None:
            raise ApiError("item_id: only replies can be cut", "item_id", code="invalid_value")
        if item.cut_ms is None and event.audio_end_ms > 1000 * item.seconds:
            message = f"audio_end_ms: the item has only {1000 * item.seconds:.0f} ms of sound"
            raise ApiError(message, "audio_end_ms", code="invalid_value")
        if self._replies.item is item:
            await self._replies.cancel("client_cancelled")
        if item.cut_ms is None or event.audio_end_ms < item.cut_ms:
            self._dialogue.cut(item, event.audio_end_ms)
        await self.send(
            "conversation.item.truncated", item_id=item.id, content_index=0, audio_end_ms=event.audio_end_ms
        )

    async def _delete_item(self, event: fields.ItemDelete) -> None:
        item = self._item(event.item_id)
        if self._replies.item is item:
            await self._replies.cancel("client_cancelled")
        self._dialogue.items.remove(item)
        await self.send("conversation.item.deleted", item_id=item.id)

    async def _retrieve_item(self, event: fields.ItemRetrieve) -> None:
        await self.send("conversation.item.retrieved", item=shown(self._item(event.item_id)))

    async def _say_added(self, item: Item, previous: str | None) -> None:
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self.send(kind, item=shown(item), previous_item_id=previous)

    def _item(self, item_id: str) -> Item:
        for item in self._dialogue.items:
            if item.id == item_id:
                return item
        raise _no_item("item_id", item_id)

    def _last_id(self) -> str | None:
        return self._dialogue.items[-1].id if self._dialogue.items else None

    def _check_room(self) -> None:
        if len(self._dialogue.items) >= MOST_ITEMS:
            raise ApiError(f"the conversation holds {MOST_ITEMS} items; delete some", code="too_many_items")

    # -- responses --------------------------------------------------------------------------------------------

    async def _create_response(self, event: fields.ResponseCreate) -> None:
        settings = self._settings
        if event.response:
            given = {name: getattr(settings, name) for name in fields.Reply.model_fields}
            chosen = check(fields.Reply, given | event.response)
            settings = settings.model_copy(update={name: getattr(chosen, name) for name in given})
        settings.options(self._service.options.new_tokens)
        await self._replies.start(settings, False)

    async def _cancel_response(self, event: fields.ResponseCancel) -> None:
        if not await self._replies.cancel("client_cancelled", event.response_id):
            raise ApiError(
                "there is no such reply to cancel", "response_id", code="response_cancel_not_active"
            )


def new_id(prefix: str) -> str:
    """A fresh id."""
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


def shown(item: Item) -> dict[str, Any]:
    """An item as clients see it."""
    content: dict[str, Any]
    if item.role == "assistant":
        spoken = item.seconds > 0
        content = (
            {"type": "output_audio", "transcript": item.text}
            if spoken
            else {"type": "output_text", "text": item.text}
        )
    elif item.speech is not None:
        content = {"type": "input_audio", "transcript": item.text or None}
    else:
        content = {"type": "input_text", "text": item.text}
    head = {"id": item.id, "object": "realtime.item", "type": "message", "status": "completed"}
    return head | {"role": item.role, "content": [content]}


def _read_content(message: fields.Message) -> tuple[str, bytes | None]:
    """Text and sound of an item that a client adds; at most one of its parts is sound, the last one."""
    texts: list[str] = []
    encoded: bytes | None = None
    for index, part in enumerate(message.content):
        param = f"item.content[{index}]"
        wanted = "output" if message.role == "assistant" else "input"
        if not part.type.startswith(wanted) or (part.type.endswith("audio") and message.role != "user"):
            raise ApiError(f"{param}.type: the role {message.role} cannot hold it", f"{param}.type")
        if encoded is not None:
            raise ApiError(f"{param}: sound must be the last part of an item", param, code="invalid_value")
        if part.type.endswith("audio"):
            encoded = from_base64(part.audio or "", f"{param}.audio")
        else:
            texts.append(part.text or "")
    return "".join(texts), encoded


def _no_item(param: str, item_id: str | None) -> ApiError:
    return ApiError(f"{param}: there is no item {item_id!r}", param, code="item_not_found")


def _unknown_event(error: ValidationError) -> ApiError:
    """A fault of an event; the first place pydantic names is the event's type."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return ApiError("type: there is no such event", "type", code="unknown_event")
    return invalid(error, skipped=0 if fault["type"] == "json_invalid" else 1)
