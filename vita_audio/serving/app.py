"""The application: every address of the server.

service = Service(pipeline, options, "my-model")
app = create_app(service)          # runs the engine while the application runs
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vita_audio.serving import errors
from vita_audio.serving.chat import complete
from vita_audio.serving.errors import ApiError
from vita_audio.serving.fields import ChatBody, SpeechBody, TranscriptionFields
from vita_audio.serving.guard import Guard
from vita_audio.serving.metrics import PROMETHEUS
from vita_audio.serving.realtime import converse
from vita_audio.serving.service import Service
from vita_audio.serving.speech import speak
from vita_audio.serving.transcriptions import transcribe

PAGE = Path(__file__).parent / "page"

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The application around a service. It runs the engine from its start to its end.

    Args:
        service: answers the requests.
        keys: accepted API keys; none: no key is needed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with service.running():
            yield

    app = FastAPI(title="VITA-Audio", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, errors.on_api_error)
    app.add_exception_handler(HTTPException, errors.on_http_error)
    app.add_exception_handler(ClientDisconnect, errors.on_disconnect)
    app.add_exception_handler(Exception, errors.on_failure)
    _add_addresses(app, service)
    _add_page(app)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=service.options.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    app.add_middleware(Guard, service=service, keys=keys)
    return app


def _add_addresses(app: FastAPI, service: Service) -> None:
    created = int(time.time())
    model = {"id": service.name, "object": "model", "created": created, "owned_by": "vita-audio"}

    @app.get("/health")
    async def health() -> Response:
        """200 when the server answers requests; 503 before and after."""
        status = "draining" if service.draining else "ready" if service.ready else "starting"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), headers={"Content-Type": PROMETHEUS})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def model_by_name(name: str) -> dict[str, Any]:
        """The same model by its name."""
        service.check_model(name)
        return model

    @app.get("/v1/voices")
    async def voices() -> dict[str, Any]:
        """Names of the voices."""
        return {"object": "list", "data": [{"id": name, "object": "voice"} for name in service.voice_names]}

    @app.post("/v1/audio/speech", openapi_extra=_body(SpeechBody))
    async def audio_speech(request: Request) -> Response:
        """Text to speech."""
        return await speak(service, request)

    @app.post("/v1/audio/transcriptions", openapi_extra=_body(TranscriptionFields, "multipart/form-data"))
    async def audio_transcriptions(request: Request) -> Response:
        """Speech to text."""
        return await transcribe(service, request)

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Text and speech in, text and speech out."""
        return await complete(service, request)

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        """A conversation."""
        await converse(service, socket)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page to talk to."""
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE))


def _body(kind: type[BaseModel], media_type: str = "application/json") -> dict[str, Any]:
    """The description of a body that the handler reads itself."""
    schema = kind.model_json_schema()
    return {"requestBody": {"content": {media_type: {"schema": schema}}, "required": True}}
