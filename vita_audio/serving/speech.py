"""``POST /v1/audio/speech``: text to speech."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from vita_audio.audio import AudioLike
from vita_audio.inference import AudioChunk, Event, Reply, prompts
from vita_audio.serving.errors import ApiError
from vita_audio.serving.fields import SpeechBody, read_json, voice_name
from vita_audio.serving.responses import begin, from_base64, server_sent, to_base64
from vita_audio.serving.service import DEFAULT_VOICE, Service
from vita_audio.serving.sounds import MEDIA_TYPES, SoundEncoder


async def speak(service: Service, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: see :func:`~vita_audio.serving.fields.read_json`; or voice or text cannot be used.
    """
    body = await read_json(request, SpeechBody)
    service.check_model(body.model)
    check_text(body.input, "input", service)
    options = body.options(service.options.new_tokens)
    voice = await chosen_voice(service, voice_name(body.voice), "voice", body.voice_audio)
    asked = await service.prepare(prompts.synthesis(body.input, voice), options, "streamed", "input")
    events = service.reply(asked)
    encoder = await asyncio.to_thread(SoundEncoder, service.pipeline.codec.sample_rate, body.response_format)
    if body.stream_format == "sse":
        return await begin(server_sent(_events(events, encoder, len(asked.prompt))), "text/event-stream")
    return await begin(_bytes(events, encoder), MEDIA_TYPES[body.response_format])


async def chosen_voice(service: Service, name: str, param: str, clip: str | None) -> AudioLike | None:
    """The voice prompt that a request chooses: a clip in base64, else a voice by name. None: the model's own.

    Raises:
        ApiError: there is no such voice, both are given, or the clip cannot be used.
    """
    if clip is None:
        return service.voice(name, param)
    if name != DEFAULT_VOICE:
        raise ApiError(f"voice_audio: leave out {param} to use it", "voice_audio", code="invalid_value")
    return await service.decode(from_base64(clip, "voice_audio"), "voice_audio")


def check_text(text: str, param: str, service: Service) -> None:
    """Refuse a text that is too long.

    Raises:
        ApiError: it is.
    """
    most = service.options.text_characters
    if len(text) > most:
        message = f"{param}: has {len(text)} characters; at most {most} are accepted"
        raise ApiError(message, param, code="string_above_max_length")


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Tokens of a request and its reply, as the audio endpoints state them."""
    total = prompt_tokens + new_tokens
    return {"input_tokens": prompt_tokens, "output_tokens": new_tokens, "total_tokens": total}


async def _sound(
    events: AsyncGenerator[Event, None], encoder: SoundEncoder
) -> AsyncGenerator[bytes | Reply, None]:
    """The pieces of the file, then the reply."""
    reply: Reply | None = None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, AudioChunk):
                if piece := encoder.push(event.samples):
                    yield piece
            elif isinstance(event, Reply):
                reply = event
                if reply.waveform is None:
                    raise ApiError("the model did not speak", "input", 500, "no_speech")
                if piece := encoder.push(reply.waveform[:0], last=True):
                    yield piece
                yield reply


async def _bytes(events: AsyncGenerator[Event, None], encoder: SoundEncoder) -> AsyncGenerator[bytes, None]:
    async with aclosing(_sound(events, encoder)) as pieces:
        async for piece in pieces:
            if isinstance(piece, bytes):
                yield piece


async def _events(
    events: AsyncGenerator[Event, None], encoder: SoundEncoder, prompt_tokens: int
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(_sound(events, encoder)) as pieces:
        async for piece in pieces:
            if isinstance(piece, bytes):
                yield {"type": "speech.audio.delta", "audio": to_base64(piece)}
            else:
                used = usage(prompt_tokens, piece.timings.new_tokens)
                yield {"type": "speech.audio.done", "usage": used}
