"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

_logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A request that is refused, or a reply that failed.

    Args:
        message: one line for the client.
        param: the field at fault, with its place: ``messages[0].content``.
        status: HTTP status.
        code: OpenAI's code of the error.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        names = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def to_dict(self) -> dict[str, Any]:
        """The ``error`` object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": self.to_dict()}, self.status, headers)


def draining() -> ApiError:
    """The server ends."""
    return ApiError("the server is shutting down; try again soon", None, 503, "shutting_down", retry_after=5)


def overloaded() -> ApiError:
    """No slot is free, and the queue is full."""
    return ApiError("the server is busy; try again soon", None, 503, "overloaded", retry_after=1)


def client_left() -> ApiError:
    """The client did not wait for its answer; the status 499 is for the log."""
    return ApiError("the client left", None, 499)


def invalid(error: ValidationError, skipped: int = 0) -> ApiError:
    """The first fault that pydantic found, by the name of its field, whose place begins after ``skipped`` names."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    # A field with several forms has a fault for each; the one that lies deepest is about the form that was meant.
    fault = max(
        (each for each in faults if each["loc"][: skipped + 1] == faults[0]["loc"][: skipped + 1]),
        key=lambda each: len(each["loc"]),
    )
    name = path(_places(fault["loc"][skipped:]))
    if fault["type"] == "extra_forbidden":
        return ApiError(f"{name}: there is no such field", name, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(f"{name}: is missing", name, code="missing_required_parameter")
    if fault["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {fault['msg'].removeprefix('Invalid JSON: ')}")
    return ApiError(f"{name}: {fault['msg']}" if name else fault["msg"], name, code="invalid_value")


def _places(loc: Sequence[str | int]) -> list[str | int]:
    """The place of a fault without the names of types and of variants that pydantic adds to it."""
    variants = {index + 2 for index, place in enumerate(loc) if str(place).startswith("list[tagged-union")}
    return [
        place
        for index, place in enumerate(loc)
        if index not in variants and (isinstance(place, int) or (place.isidentifier() and place != "str"))
    ]


def path(places: Sequence[str | int]) -> str | None:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    text = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)
    return text.removeprefix(".") or None


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of :class:`ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_disconnect(request: Request, error: Exception) -> JSONResponse:
    """Handler of a body that ends too early."""
    return client_left().response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Handler of the framework's own errors, such as an unknown address."""
    status = getattr(error, "status_code", 500)
    what = {404: "there is no such address", 405: f"the method {request.method} is not allowed here"}
    return ApiError(what.get(status, str(getattr(error, "detail", error))), None, status).response()


async def on_failure(request: Request, error: Exception) -> JSONResponse:
    """Handler of everything else. The client learns nothing of the inside; the log does."""
    return failure(error).response()


def failure(error: BaseException) -> ApiError:
    """An error of ours, as clients see it; the log holds its traceback."""
    _logger.error("a reply failed", exc_info=error)
    return ApiError("the server failed to answer; its log says why", None, 500, "internal_error")
