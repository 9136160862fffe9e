"""``POST /v1/chat/completions``: text and speech in, text and speech out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import torch
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from vita_audio.audio import AudioLike
from vita_audio.chat import Message
from vita_audio.constants import VOICE_PROMPT
from vita_audio.inference import AudioChunk, Conversation, Event, Reply, TextDelta
from vita_audio.inference import Request as Asked
from vita_audio.serving.errors import ApiError
from vita_audio.serving.fields import ChatBody, ChatMessage, TextPart, read_json, voice_name
from vita_audio.serving.responses import begin, from_base64, server_sent, to_base64, while_connected, whole
from vita_audio.serving.service import DEFAULT_VOICE, Service
from vita_audio.serving.sounds import SoundEncoder
from vita_audio.serving.speech import check_text, chosen_voice

AUDIO_EXPIRES_SECONDS = 0
"""Replies are not kept: earlier ones are sent back as text."""


async def complete(service: Service, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: a field cannot be used.
    """
    body = await read_json(request, ChatBody)
    service.check_model(body.model)
    speaks = "audio" in body.modalities
    _check_modalities(body, speaks)
    options = body.options(service.options.new_tokens, body.max_completion_tokens or body.max_tokens)
    conversation = await read_conversation(service, body)
    asked = await service.prepare(conversation, options, "streamed" if speaks else "none", "messages")
    answer = _Answer(service, body, asked)
    events = service.reply(asked)
    if body.stream:
        return await begin(server_sent(answer.stream(events), b"data: [DONE]\n\n"), "text/event-stream")
    reply = await while_connected(request, whole(events))
    return JSONResponse(await asyncio.to_thread(answer.whole, reply))


def _check_modalities(body: ChatBody, speaks: bool) -> None:
    if "text" not in body.modalities:
        raise ApiError("modalities: speech always comes with its text; give both", "modalities")
    if speaks and body.audio is None:
        raise ApiError(
            "audio: is missing; modalities asks for it", "audio", code="missing_required_parameter"
        )
    if body.audio is not None and not speaks:
        raise ApiError("audio: modalities does not ask for it", "audio")
    if body.stream and body.audio is not None and body.audio.format != "pcm16":
        raise ApiError("audio.format: a stream holds pcm16 only", "audio.format", code="invalid_value")


async def read_conversation(service: Service, body: ChatBody) -> Conversation:
    """The messages, with a system message or a voice prompt in front.

    Raises:
        ApiError: a message, clip or voice cannot be used.
    """
    messages: list[Message] = []
    audios: list[AudioLike] = []
    characters = 0
    for index, message in enumerate(body.messages):
        turn, clips = await _read_message(service, message, index)
        characters += len(turn.text)
        messages.append(turn)
        audios += clips
    if characters > service.options.text_characters:
        check_text(" " * characters, "messages", service)
    if messages[-1].role != "user":
        raise ApiError("messages: the last one must be the user's", "messages", code="invalid_value")
    has_system = messages[0].role == "system"
    if any(message.role == "system" for message in messages[1:]):
        raise ApiError("messages: a system message can only come first", "messages", code="invalid_value")
    name = DEFAULT_VOICE if body.audio is None else voice_name(body.audio.voice)
    voice = await chosen_voice(service, name, "audio.voice", body.voice_audio)
    if voice is not None:
        if has_system:
            raise ApiError("audio.voice: takes the place of a system message; give only one", "audio.voice")
        return Conversation((Message.of("system", VOICE_PROMPT), *messages), (voice, *audios))
    if not has_system and (system := service.pipeline.system_message()) is not None:
        messages.insert(0, Message("system", (system,)))
    return Conversation(tuple(messages), tuple(audios))


async def _read_message(
    service: Service, message: ChatMessage, index: int
) -> tuple[Message, list[AudioLike]]:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role, (message.content,)), []
    texts: list[str] = [""]
    clips: list[AudioLike] = []
    for place, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts[-1] += part.text
            continue
        param = f"messages[{index}].content[{place}].input_audio.data"
        if role != "user":
            raise ApiError(f"{param}: only the user's messages hold sound", param, code="invalid_value")
        clips.append(await service.decode(from_base64(part.input_audio.data, param), param))
        texts.append("")
    return Message(role, tuple(texts)), clips


class _Answer:
    """One completion in OpenAI's form."""

    def __init__(self, service: Service, body: ChatBody, asked: Asked):
        self._body = body
        self._asked = asked
        self._rate = service.pipeline.codec.sample_rate
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._audio_id = f"audio_{uuid.uuid4().hex}"
        self._head = {"id": self._id, "created": int(time.time()), "model": service.name}

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The completion of a whole reply."""
        message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
        if self._body.audio is not None:
            container = self._body.audio.format
            encoder = SoundEncoder(self._rate, "pcm" if container == "pcm16" else container)
            waveform: Tensor = torch.empty(0) if reply.waveform is None else reply.waveform
            message |= {
                "content": None,
                "audio": self._audio(
                    data=to_base64(encoder.push(waveform, last=True)), transcript=reply.text
                ),
            }
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(reply), "logprobs": None}
        return self._head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(reply),
        }

    async def stream(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[dict[str, Any], None]:
        """The completion as chunks."""
        speaks = self._body.audio is not None
        encoder = SoundEncoder(self._rate, "pcm")
        # The first chunk waits for the first event, so that a refused request gets an error and no stream.
        begun = False
        async with aclosing(events):
            async for event in events:
                if not begun:
                    begun = True
                    yield self._chunk({"role": "assistant", "content": None if speaks else ""})
                if isinstance(event, TextDelta):
                    text = (
                        {"audio": self._audio(transcript=event.text)} if speaks else {"content": event.text}
                    )
                    yield self._chunk(text)
                elif isinstance(event, AudioChunk) and speaks:
                    if pcm := encoder.push(event.samples):
                        yield self._chunk({"audio": self._audio(data=to_base64(pcm))})
                elif isinstance(event, Reply):
                    if speaks and (pcm := encoder.push(torch.empty(0), last=True)):
                        yield self._chunk({"audio": self._audio(data=to_base64(pcm))})
                    yield self._chunk({}, _finish_reason(event))
                    if self._body.stream_options is not None and self._body.stream_options.include_usage:
                        yield self._chunk(None) | {"usage": self._usage(event)}

    def _chunk(self, delta: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        choices = [] if delta is None else [choice]
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _audio(self, **fields: str) -> dict[str, Any]:
        expires = int(time.time()) + AUDIO_EXPIRES_SECONDS
        return {"id": self._audio_id, "expires_at": expires, **fields}

    def _usage(self, reply: Reply) -> dict[str, Any]:
        prompt, new = len(self._asked.prompt), reply.timings.new_tokens
        spoken = len(reply.codes)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "completion_tokens_details": {"audio_tokens": spoken, "text_tokens": new - spoken},
        }


def _finish_reason(reply: Reply) -> str:
    """``length`` if no token ended the reply."""
    return "length" if reply.timings.new_tokens == len(reply.token_ids) else "stop"
