"""The user's side of a realtime connection: samples come in, encoded turns go out.

Speech is encoded while it is spoken, so only its last block is left when it ends. Silence between turns is dropped but
for the padding in front of the next turn, and so is the silence that shows that a turn has ended: questions in the
training data end soon after their last word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vita_audio.audio import AudioTokenizer
from vita_audio.audio.resampling import StreamResampler
from vita_audio.serving import detection
from vita_audio.serving.detection import TurnDetector
from vita_audio.serving.sounds import RATE

TAIL = RATE // 10
"""Samples kept after the end of speech."""

LATE = RATE // 10
"""Samples after which speech is detected at the latest."""


@dataclass(frozen=True)
class Detection:
    """What the detector needs to know.

    Attributes:
        threshold: probability above which a window is speech.
        prefix_ms: sound kept in front of a turn, in ms.
        silence_ms: silence that ends a turn, in ms.
    """

    threshold: float = 0.5
    prefix_ms: int = 300
    silence_ms: int = 500


@dataclass(frozen=True)
class Speech:
    """A turn of the user, encoded.

    Attributes:
        content: codes, or features (frames, d) for a model with continuous input.
        seconds: its duration.
    """

    content: list[int] | Tensor
    seconds: float


@dataclass
class Heard:
    """What further samples led to.

    Attributes:
        started: a turn began at this ms of the connection's sound.
        stopped: the turn ended at this ms.
        speech: the turn that ended.
    """

    started: int | None = None
    stopped: int | None = None
    speech: Speech | None = None


@dataclass
class _Clip:
    """A clip that is being encoded."""

    stream: Any
    parts: list[Any] = field(default_factory=list)
    samples: int = 0


class Listener:
    """Hears one connection. Not for several threads at once.

    Args:
        codec: encodes the speech.
        longest_seconds: longest turn; it ends there.
        detect: finds the turns; None: the client says where they end.
    """

    def __init__(self, codec: AudioTokenizer, longest_seconds: float, detect: Detection | None):
        self._codec = codec
        self._longest = int(longest_seconds * RATE)
        self._detect = detect
        self._detector = None if detect is None else TurnDetector(detect.threshold, detect.silence_ms)
        self._to_detector = StreamResampler(RATE, detection.RATE)
        self._clip: _Clip | None = None
        self._waiting = torch.empty(0)  # samples that are not encoded, yet or ever
        self._first = 0  # index of the first of them

    @property
    def full(self) -> bool:
        """Whether the buffer holds the longest turn."""
        return self._clip is not None and self._clip.samples >= self._longest

    def push(self, samples: Tensor) -> list[Heard]:
        """Hear further samples, (samples,) float32 at 24 kHz. Returns the turns that begin or end in them."""
        if self._detector is None:
            self._encode(samples)
            return []
        self._waiting = torch.cat([self._waiting, samples])
        news: list[Heard] = []
        for turn in self._detector.push(self._to_detector.push(samples)):
            at = turn.sample * 1000 // detection.RATE
            if turn.kind == "started":
                self._drop_before(turn.sample * RATE // detection.RATE - self._prefix)
                self._encode(torch.empty(0))
                news.append(Heard(started=at))
            elif self._clip is not None:
                self._encode_until(turn.sample)
                news.append(Heard(stopped=at, speech=self.commit()))
        if self._detector.speech_until is None or self._clip is None:
            # Silence; or the turn was committed while the speech goes on, and its rest is not heard.
            self._drop_before(self._first + len(self._waiting) - self._prefix - LATE)
        else:
            self._encode_until(self._detector.speech_until)
            if self.full:
                at = self._detector.speech_until * 1000 // detection.RATE
                news.append(Heard(stopped=at, speech=self.commit()))
        return news

    def commit(self) -> Speech | None:
        """End the turn. None: there was no sound."""
        if self._clip is None or not self._clip.samples:
            return None
        clip, self._clip = self._clip, None
        clip.parts.append(clip.stream.push(torch.empty(0), last=True))
        seconds = clip.samples / RATE
        if self._codec.continuous_input:
            return Speech(torch.cat(clip.parts), seconds)
        return Speech([code for part in clip.parts for code in part], seconds)

    def clear(self) -> None:
        """Forget the turn that is being spoken."""
        self._clip = None
        self._drop_before(self._first + len(self._waiting))

    @property
    def _prefix(self) -> int:
        return 0 if self._detect is None else self._detect.prefix_ms * RATE // 1000

    def _encode_until(self, speech_until: int) -> None:
        """Encode up to a little after the end of speech; the silence that follows is held back."""
        count = max(0, speech_until * RATE // detection.RATE + TAIL - self._first)
        self._encode(self._waiting[:count])
        self._drop_before(self._first + count)

    def _drop_before(self, index: int) -> None:
        count = min(max(0, index - self._first), len(self._waiting))
        self._waiting = self._waiting[count:]
        self._first += count

    def _encode(self, samples: Tensor) -> None:
        if self._clip is None:
            continuous = self._codec.continuous_input
            stream = self._codec.feature_stream(RATE) if continuous else self._codec.encode_stream(RATE)
            self._clip = _Clip(stream)
        samples = samples[: self._longest - self._clip.samples]
        if len(samples):
            self._clip.parts.append(self._clip.stream.push(samples))
            self._clip.samples += len(samples)
