"""``POST /v1/audio/transcriptions``: speech to text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from vita_audio.inference import Event, Reply, TextDelta, prompts
from vita_audio.serving.errors import ApiError
from vita_audio.serving.fields import TranscriptionFields, check
from vita_audio.serving.responses import begin, server_sent, while_connected, whole
from vita_audio.serving.service import Service
from vita_audio.serving.speech import usage

MOST_FIELDS = 32
_LISTS = ("mode",)


async def transcribe(service: Service, request: Request) -> Response:
    """Answer a request.

    Raises:
        ApiError: the form, a field or the clip cannot be used.
    """
    encoded, fields = await read_form(request)
    service.check_model(fields.model)
    options = fields.options(service.options.new_tokens)
    clip = await service.decode(encoded, "file")
    asked = await service.prepare(prompts.transcription(clip), options, "none", "file")
    events = service.reply(asked)
    if fields.stream:
        return await begin(server_sent(_events(events, len(asked.prompt))), "text/event-stream")
    reply = await while_connected(request, whole(events))
    if fields.response_format == "text":
        return PlainTextResponse(reply.text.strip() + "\n")
    return JSONResponse({"text": reply.text.strip(), "usage": _usage(len(asked.prompt), reply)})


async def read_form(request: Request) -> tuple[bytes, TranscriptionFields]:
    """The file and the other fields of a form.

    Raises:
        ApiError: it is no form, the file is missing, or a field is unknown or wrong.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError("the body must be of the type multipart/form-data", None, 415)
    texts: dict[str, Any] = {}
    encoded: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=MOST_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name != "file":
                        raise ApiError(f"{name}: there is no such file field", name, code="unknown_parameter")
                    encoded = await value.read()
                elif name.removesuffix("[]") in _LISTS and name.endswith("[]"):
                    texts.setdefault(name.removesuffix("[]"), []).append(value)
                elif name in texts:
                    raise ApiError(f"{name}: is given twice", name, code="invalid_value")
                else:
                    texts[name] = value
    except MultiPartException as error:
        raise ApiError(f"the form cannot be read: {error.message}") from error
    if encoded is None:
        raise ApiError("file: is missing", "file", code="missing_required_parameter")
    return encoded, check(TranscriptionFields, texts)


def _usage(prompt_tokens: int, reply: Reply) -> dict[str, Any]:
    return {"type": "tokens"} | usage(prompt_tokens, reply.timings.new_tokens)


async def _events(
    events: AsyncGenerator[Event, None], prompt_tokens: int
) -> AsyncGenerator[dict[str, Any], None]:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TextDelta):
                yield {"type": "transcript.text.delta", "delta": event.text}
            elif isinstance(event, Reply):
                used = _usage(prompt_tokens, event)
                yield {"type": "transcript.text.done", "text": event.text.strip(), "usage": used}
