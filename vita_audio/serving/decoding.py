"""Clips of clients, decoded in a process of its own.

Decoders of sound formats are large C libraries, and a client may send anything. A clip that makes one of them crash,
hang or ask for all memory costs the process here, and one request an error.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np
import torch
from torch import Tensor

from vita_audio.audio import AudioError, audio_duration, load_audio
from vita_audio.serving.errors import ApiError

MEMORY_BYTES = 2 << 30
"""Memory that one clip may take in the process, beyond what the process needs itself."""


class ClipDecoder:
    """Decodes encoded files to waveforms.

    Args:
        longest_seconds: longest clip.
        timeout_seconds: a clip that takes longer is refused, and the process is replaced.
    """

    def __init__(self, longest_seconds: float, timeout_seconds: float = 20.0):
        self._longest = longest_seconds
        self._timeout = timeout_seconds
        self._one = threading.Lock()
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    async def decode(self, encoded: bytes, param: str) -> tuple[Tensor, int]:
        """A clip as one channel, (samples,) float32, and its rate in Hz.

        Args:
            encoded: a sound file of any format.
            param: the field that holds it, for errors.

        Raises:
            ApiError: the clip cannot be read, or is too long.
        """
        return await asyncio.to_thread(self._decode, encoded, param)

    def close(self) -> None:
        """End the process."""
        with self._one:
            self._stop()

    def start(self) -> None:
        """Start the process, so that the first clip does not wait for it."""
        with self._one:
            self._running()

    def _decode(self, encoded: bytes, param: str) -> tuple[Tensor, int]:
        with self._one:
            pipe = self._running()
            try:
                pipe.send_bytes(encoded)
                if not pipe.poll(self._timeout):
                    raise TimeoutError
                answer = pipe.recv()
            except (EOFError, OSError) as error:  # TimeoutError is an OSError
                self._stop()
                took = "takes too long" if isinstance(error, TimeoutError) else "stops the decoder"
                raise ApiError(f"{param}: the clip {took}", param, code="invalid_audio") from None
        if isinstance(answer, str):
            raise ApiError(f"{param}: {answer}", param, code="invalid_audio")
        samples, rate = answer
        return torch.from_numpy(samples), rate

    def _running(self) -> Connection:
        if self._process is None or not self._process.is_alive() or self._pipe is None:
            self._stop()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve, args=(theirs, self._longest), name="clips", daemon=True
            )
            self._process.start()
            theirs.close()
            if not (self._pipe.poll(60) and self._pipe.recv() is None):
                raise RuntimeError("the process that decodes clips does not start")
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection, longest_seconds: float) -> None:
    """The process: bytes in; samples and rate, or what is wrong in one line, out."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        limit = _used_bytes() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send(None)
    while True:
        try:
            encoded = pipe.recv_bytes()
        except (EOFError, KeyboardInterrupt):
            return
        pipe.send(_read(encoded, longest_seconds))


def _read(encoded: bytes, longest_seconds: float) -> tuple[np.ndarray, int] | str:
    try:
        seconds = audio_duration(encoded)
        if seconds > longest_seconds:
            return f"the clip lasts {seconds:.1f} s; at most {longest_seconds:g} s are accepted"
        waveform, rate = load_audio(encoded)
    except AudioError as error:
        return str(error)
    except (MemoryError, RuntimeError):
        return "the clip needs too much memory"
    return waveform.numpy(), rate


def _used_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
