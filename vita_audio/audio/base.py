"""The interface of every speech codec: speech to tokens and back.

The rest of the project uses codecs only through :class:`AudioTokenizer`. A codec is frozen: it has no
gradients, draws no global random numbers and keeps no state between calls. The state of a stream
is kept in the :class:`AudioStream` or :class:`EncodeStream` that the caller holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, BinaryIO, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor


class AudioError(ValueError):
    """Audio that cannot be used.

    Attributes:
        reason: ``"missing"``, ``"empty"``, ``"unreadable"``, ``"truncated"``, ``"nan"`` (not finite),
            ``"shape"``, ``"dtype"``, ``"rate"`` or ``"range"`` (samples far outside [-1, 1]).
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


class AudioDecoder(Protocol):
    """torchcodec's decoder, which ``datasets`` returns for an audio column."""

    def get_all_samples(self) -> Any:
        """An object with ``data`` of shape (channels, samples) and ``sample_rate``."""


AudioLike: TypeAlias = (
    str
    | PathLike[str]
    | bytes
    | BinaryIO
    | tuple[Tensor | np.ndarray, int]
    | tuple[int, Tensor | np.ndarray]
    | Mapping[str, Any]
    | AudioDecoder
)
"""One clip, in any unambiguous form:

* a path;
* an encoded file as ``bytes``, or a binary file object, read from its position to its end;
* ``(waveform, sample_rate)`` or ``(sample_rate, waveform)``;
* a mapping as returned by ``datasets``: ``{"array": waveform, "sampling_rate": rate}`` or
  ``{"bytes": encoded file or None, "path": path}``;
* an object with ``get_all_samples()``, such as torchcodec's ``AudioDecoder``.

A waveform is a tensor or array of shape (samples,), (channels, samples) or (samples, channels) with at most
32 channels, in any byte order and memory layout. Floats are in [-1, 1]; int8, int16, int32 and unsigned 8 and
16 bits are scaled by their range. :func:`~vita_audio.audio.load_audio` refuses everything else in one line.
"""


class AudioStream(ABC):
    """Incremental decoding of one reply."""

    @abstractmethod
    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        """Decode the next codes.

        Args:
            tokens: codes in ``[0, codebook_size)`` that follow those already pushed; may be empty.
            last: whether the reply ends here; flushes what the stream held back.

        Returns:
            Newly final samples, shape (samples,), float32 in [-1, 1]; may be empty.

        Raises:
            ValueError: a code is out of range; the stream is unchanged.
        """

    @property
    def missing(self) -> int:
        """Number of codes after which :meth:`push` has work to do; at least 1."""
        return 1


class EncodeStream(ABC):
    """Encoding of one clip while it is still being recorded."""

    @abstractmethod
    def push(self, waveform: Tensor | np.ndarray, last: bool = False) -> list[int]:
        """Encode the next samples.

        Args:
            waveform: next samples, shape (samples,), at the stream's rate; may be empty. Types are those
                of :data:`AudioLike`.
            last: whether the clip ends here; returns the remaining codes and starts a new clip.

        Returns:
            Newly final codes; may be empty.

        Raises:
            AudioError: the samples cannot be used; the stream is unchanged.
        """


class FeatureStream(ABC):
    """Continuous features of one clip while it is still being recorded."""

    @abstractmethod
    def push(self, waveform: Tensor | np.ndarray, last: bool = False) -> Tensor:
        """Newly final features, shape (frames, feature_dim); see :meth:`EncodeStream.push`."""


class AudioTokenizer(ABC):
    """A frozen speech codec.

    Attributes:
        kind: the codec's registered name, such as ``"glm4voice"``.
        sample_rate: of the audio that ``decode`` returns, in Hz.
        input_sample_rate: rate to which speech is resampled before encoding, in Hz.
        frame_rate: codes per second of speech.
        codebook_size: number of distinct codes.
        device: where it decodes.
    """

    kind: str
    sample_rate: int
    input_sample_rate: int = 16_000
    frame_rate: float = 12.5
    codebook_size: int
    device: torch.device = torch.device("cpu")

    @property
    def continuous_input(self) -> bool:
        """Whether user speech enters the model as features instead of codes."""
        return is_continuous_kind(self.kind)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A short stable name of codec and weights; the key of code caches."""

    @abstractmethod
    def encode(self, audio: AudioLike) -> list[int]:
        """Speech to codes in ``[0, codebook_size)``.

        Raises:
            AudioError: the audio cannot be read; the message names file and reason.
            ValueError: the codec was opened for decoding only.
        """

    def load_encoder(self) -> None:  # noqa: B027  (most codecs have nothing left to load)
        """Load what :meth:`encode` needs, where that would wait for the first clip.

        Raises:
            ValueError: it cannot be loaded.
        """

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        """Codes of several clips, equal to encoding them one by one."""
        return [self.encode(audio) for audio in audios]

    def encode_stream(self, sample_rate: int | None = None) -> EncodeStream:
        """A fresh streaming encoder; several may be open at once.

        Codes do not depend on how the clip is split, and equal those of :meth:`encode`; codecs document any
        exception. This default returns all codes with the last piece, for codecs whose codes depend on the
        whole clip.

        Args:
            sample_rate: of the pieces in Hz; defaults to ``input_sample_rate``.
        """
        from vita_audio.audio.streams import WholeClipStream

        return WholeClipStream(self, sample_rate)

    def features(self, audio: AudioLike) -> Tensor:
        """Continuous features of shape (frames, feature_dim); continuous kinds only."""
        raise NotImplementedError(f"the {self.kind} codec has no continuous features")

    def feature_stream(self, sample_rate: int | None = None) -> FeatureStream:
        """A fresh stream of :meth:`features`, independent of how the clip is split; continuous kinds only.

        Args:
            sample_rate: of the pieces in Hz; defaults to ``input_sample_rate``.
        """
        raise NotImplementedError(f"the {self.kind} codec has no continuous features")

    @abstractmethod
    def decode(
        self, tokens: Sequence[int], steps: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes to speech.

        Args:
            tokens: codes in ``[0, codebook_size)``.
            steps: solver steps, if the decoder has a solver; more steps are better and slower.
            generator: source of the decoder's noise; None for a fixed seed.

        Returns:
            Waveform of shape (samples,), float32 in [-1, 1], at ``sample_rate``.

        Raises:
            ValueError: a code is out of range, or the codec was opened for encoding only.
        """

    @abstractmethod
    def stream(self, generator: torch.Generator | None = None) -> AudioStream:
        """A fresh streaming decoder; several may be open at once."""

    def push_many(
        self, streams: Sequence[AudioStream], tokens: Sequence[Sequence[int]], last: Sequence[bool]
    ) -> list[Tensor]:
        """:meth:`AudioStream.push` for several streams of this codec, in shared batches if it supports them.

        Args:
            streams: distinct streams of this codec.
            tokens: next codes of each; may be empty.
            last: whether each reply ends here.

        Returns:
            Newly final samples of each, (samples,).

        Raises:
            ValueError: a code is out of range; all streams are unchanged.
        """
        for codes in tokens:
            check_codes(codes, self.codebook_size)
        return [stream.push(codes, final) for stream, codes, final in zip(streams, tokens, last, strict=True)]

    def sharing(self, streams: Sequence[AudioStream]) -> Sequence[AudioStream]:
        """The streams whose next work :meth:`push_many` does in one pass with that of the first stream.

        Others would only wait for each other in one call. This default is the first stream alone.

        Args:
            streams: distinct streams of this codec, at least one.

        Returns:
            The first stream and those that join it. If a pass fails, all its streams are as they were before.
        """
        return streams[:1]


def check_codes(codes: Sequence[int], codebook_size: int) -> None:
    """Refuse codes outside ``[0, codebook_size)``.

    Raises:
        ValueError: names the first such code and its position.
    """
    for position, code in enumerate(codes):
        if not 0 <= int(code) < codebook_size:
            raise ValueError(f"code {int(code)} at position {position} is outside [0, {codebook_size})")


def is_continuous_kind(kind: str) -> bool:
    """Whether codecs of this kind feed user speech to the model as continuous features.

    Such kinds are named ``sensevoice_<discrete kind>``: SenseVoice features in, discrete codes out.
    """
    return kind.startswith("sensevoice_")
