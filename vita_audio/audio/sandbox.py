"""Untrusted clips, decoded in a process of its own.

Decoders of sound formats are large C libraries. A clip that makes one of them crash, hang or ask for all memory costs
that process, and its sender an error.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from vita_audio.audio.base import AudioError
from vita_audio.audio.io import audio_duration, load_audio

MEMORY_BYTES = 2 << 30
"""Memory that a clip may take, beyond what the process needs itself."""

START_SECONDS = 60.0

_READY, _SOUND, _REFUSED = b"r", b"s", b"e"


class ClipProcess:
    """Decodes clips one at a time. The process starts with the first one, and again after it was lost.

    Args:
        longest_seconds: longest clip.
        timeout_seconds: a clip that takes longer is refused, and the process is replaced.
    """

    def __init__(self, longest_seconds: float, timeout_seconds: float = 20.0):
        self._longest = longest_seconds
        self._timeout = timeout_seconds
        self._one = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def decode(self, encoded: bytes) -> tuple[Tensor, int]:
        """A clip as one channel, (samples,) float32, and its rate in Hz.

        Args:
            encoded: a sound file of any format.

        Raises:
            AudioError: the clip cannot be read, is too long, or needs too much time or memory.
        """
        with self._one:
            pipe = self._running()
            try:
                pipe.send_bytes(encoded)
                if not pipe.poll(self._timeout):
                    raise TimeoutError
                answer = pipe.recv_bytes()
            except (EOFError, OSError) as error:  # TimeoutError is an OSError
                self._stop()
                took = "takes too long" if isinstance(error, TimeoutError) else "stops the decoder"
                raise AudioError(f"audio bytes: the clip {took}", "unreadable") from None
        if answer[:1] == _REFUSED:
            raise AudioError(answer[1:].decode(), "unreadable")
        (rate,) = struct.unpack_from("<I", answer, 1)
        return torch.from_numpy(np.frombuffer(answer, "<f4", offset=5).copy()), rate

    def start(self) -> None:
        """Start the process, so that the first clip does not wait for it."""
        with self._one:
            self._running()

    def close(self) -> None:
        """End the process. May be called twice."""
        with self._one:
            self._stop()

    def _running(self) -> Connection:
        if self._process is None or self._process.poll() is not None or self._pipe is None:
            self._stop()
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", __name__, str(theirs.fileno()), str(self._longest)]
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
                )
            self._pipe = Connection(ours.detach())
            if not self._pipe.poll(START_SECONDS) or self._pipe.recv_bytes() != _READY:
                self._stop()
                raise RuntimeError("the process that decodes clips does not start")
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def main(arguments: Sequence[str]) -> None:
    """The process: bytes in; samples and their rate, or what is wrong in one line, out."""
    pipe, longest = Connection(int(arguments[0])), float(arguments[1])
    torch.set_num_threads(1)
    if sys.platform == "linux":
        limit = _used_bytes() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    pipe.send_bytes(_READY)
    while True:
        try:
            pipe.send_bytes(_decode(pipe.recv_bytes(), longest))
        except (EOFError, KeyboardInterrupt):
            return


def _decode(encoded: bytes, longest_seconds: float) -> bytes:
    try:
        seconds = audio_duration(encoded)
        if seconds > longest_seconds:
            message = f"audio bytes: last {seconds:.1f} s; at most {longest_seconds:g} s are accepted"
            return _REFUSED + message.encode()
        waveform, rate = load_audio(encoded)
    except AudioError as error:
        return _REFUSED + str(error).encode()
    except (MemoryError, RuntimeError):
        return _REFUSED + b"audio bytes: the clip needs too much memory"
    return _SOUND + struct.pack("<I", rate) + waveform.numpy().astype("<f4").tobytes()


def _used_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main(sys.argv[1:])
