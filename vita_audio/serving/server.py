"""Runs the application with uvicorn. SIGTERM or Ctrl-C lets running replies end; a second one ends them."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from vita_audio.serving.service import Service

_logger = logging.getLogger("vita_audio.serving")

_LARGEST_FRAME = 1 << 20
_MAPPED_BYTES = 1 << 16
_M_MMAP_THRESHOLD = -3  # malloc.h


class Server(uvicorn.Server):
    """Serves one application until a signal, then drains.

    Args:
        app: made by :func:`~vita_audio.serving.app.create_app`.
        service: the same.
        host: address to listen on; defaults to that of the service's options.
        port: port to listen on; defaults to that of the service's options.
    """

    def __init__(self, app: FastAPI, service: Service, host: str | None = None, port: int | None = None):
        super().__init__(
            uvicorn.Config(
                app,
                host=host or service.options.host,
                port=service.options.port if port is None else port,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws_max_size=_LARGEST_FRAME,
                timeout_graceful_shutdown=5,
                lifespan="on",
            )
        )
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def address(self) -> str:
        """The address that clients use; known when :attr:`started`."""
        bound = self.servers[0].sockets[0]
        host, port = bound.getsockname()[:2]
        return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See the base class.

        Raises:
            OSError: the address cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        return_large_blocks()
        try:
            await super().startup(sockets)
        except SystemExit as error:  # uvicorn has logged why
            address = f"{self.config.host}:{self.config.port}"
            raise OSError(f"the server cannot listen on {address}") from error

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; end at once at the second signal, or before the server has started."""
        if self._loop is None or not self.started or self._service.draining:
            self.should_exit = self.force_exit = True
            return
        self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Refuse new replies; end the server when the running ones have ended."""
        self._service.draining = True
        self._drain = asyncio.get_running_loop().create_task(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        _logger.info("shutting down: running replies end first")
        await self._service.until_idle()
        self.should_exit = True


def return_large_blocks() -> None:
    """Let freed blocks of 64 KiB and more go back to the system at once, where the C library is glibc.

    It would soon keep blocks of up to 32 MiB in the heap of the thread that asked for them, and a server has many
    threads: after minutes of tensors and clips the holes in these heaps are 100 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
