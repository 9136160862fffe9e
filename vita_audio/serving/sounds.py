"""Speech as the bytes of a file, piece by piece, at 24 kHz.

``pcm``, ``wav`` and ``opus`` are sent while they are spoken. ``flac`` and ``mp3`` state their length at the front, so
they are sent in one piece at the end.
"""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from vita_audio.audio.resampling import StreamResampler

SoundFormat = Literal["wav", "pcm", "flac", "opus", "mp3"]

RATE = 24_000
"""Sample rate of all sound that is sent or received as bare samples, in Hz; OpenAI's."""

MEDIA_TYPES: dict[str, str] = {
    "wav": "audio/wav",
    "pcm": f"audio/pcm;rate={RATE}",
    "flac": "audio/flac",
    "opus": "audio/ogg",
    "mp3": "audio/mpeg",
}
_CONTAINERS = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", "MPEG_LAYER_III")}
_STREAMED = ("opus",)
_UNKNOWN_LENGTH = 0xFFFFFFFF


class SoundEncoder:
    """Encodes one reply.

    Args:
        rate: of the samples that come, in Hz.
        container: format of the bytes.
    """

    def __init__(self, rate: int, container: SoundFormat):
        self._resampler = StreamResampler(rate, RATE)
        self._container = container
        self._started = False
        self._sent = 0
        self._buffer = BytesIO()
        self._file: Any = None
        if container in _CONTAINERS:
            kind, subtype = _CONTAINERS[container]
            self._file = soundfile.SoundFile(self._buffer, "w", RATE, 1, subtype, format=kind)

    def push(self, samples: Tensor, last: bool = False) -> bytes:
        """The bytes that further samples, (samples,) float32, complete; ``last`` ends the file."""
        resampled = self._resampler.push(samples, last=last)
        if self._file is None:
            head = b"" if self._started or self._container == "pcm" else wav_header()
            self._started = True
            return head + to_pcm(resampled)
        self._file.write(resampled.clamp(-1, 1).numpy())
        if last:
            self._file.close()
        elif self._container not in _STREAMED:
            return b""
        content = self._buffer.getvalue()[self._sent :]
        self._sent += len(content)
        return content


def to_pcm(samples: Tensor) -> bytes:
    """Float samples as 16-bit little-endian PCM."""
    return (samples.clamp(-1, 1) * 32767).round().numpy().astype("<i2").tobytes()


def from_pcm(content: bytes) -> Tensor:
    """16-bit little-endian PCM as float samples."""
    return torch.from_numpy(np.frombuffer(content, dtype="<i2").astype(np.float32)) / 32768


def wav_header(length: int = _UNKNOWN_LENGTH) -> bytes:
    """Header of a WAV file with ``length`` bytes of samples; the default says that the length is not known."""
    whole = min(length + 36, _UNKNOWN_LENGTH)
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + fmt + struct.pack("<4sI", b"data", length)
