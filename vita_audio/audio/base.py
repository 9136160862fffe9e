"""What every speech codec is: speech in, tokens out, and back again.

The rest of the project sees codecs only through :class:`AudioTokenizer`. A codec is
frozen: it holds no gradients, draws no global random numbers, and keeps no state
between calls; what a streaming decoder must remember lives in the
:class:`AudioStream` that the caller holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from os import PathLike

import torch

AudioLike = str | PathLike[str] | tuple[torch.Tensor, int]
"""A path, or ``(waveform, sample_rate)`` with waveform of shape (samples,) or (channels, samples)."""


class AudioStream(ABC):
    """Decoding of one reply, piece by piece."""

    @abstractmethod
    def push(self, tokens: Sequence[int], last: bool = False) -> torch.Tensor:
        """Decode the next codes.

        Args:
            tokens: codes in ``[0, codebook_size)`` that follow those already pushed; may be empty.
            last: whether the reply ends here; flushes what the stream held back.

        Returns:
            Samples that are now final, shape (samples,), float32 in [-1, 1]; may be empty.
        """


class AudioTokenizer(ABC):
    """A frozen speech codec.

    Attributes:
        kind: the codec's registered name, such as ``"glm4voice"``.
        sample_rate: of the audio that ``decode`` returns, in Hz.
        frame_rate: codes per second of speech.
        codebook_size: number of distinct codes.
    """

    kind: str
    sample_rate: int
    frame_rate: float = 12.5
    codebook_size: int

    @property
    def continuous_input(self) -> bool:
        """Whether user speech enters the model as features instead of codes."""
        return is_continuous_kind(self.kind)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Short stable name of codec and weights; keys caches of its codes."""

    @abstractmethod
    def encode(self, audio: AudioLike) -> list[int]:
        """Speech to codes in ``[0, codebook_size)``.

        Raises:
            AudioError: the audio cannot be read; the message names file and reason.
        """

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        """Codes of several clips, equal to encoding them one by one."""
        return [self.encode(audio) for audio in audios]

    def features(self, audio: AudioLike) -> torch.Tensor:
        """Continuous features of shape (frames, feature_dim); continuous kinds only."""
        raise NotImplementedError(f"the {self.kind} codec has no continuous features")

    @abstractmethod
    def decode(
        self,
        tokens: Sequence[int],
        steps: int = 10,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Codes to speech.

        Args:
            tokens: codes in ``[0, codebook_size)``.
            steps: solver steps, where the decoder has a solver; more is better and slower.
            generator: source of the decoder's noise; a fixed seed when absent.

        Returns:
            Waveform of shape (samples,), float32 in [-1, 1], at ``sample_rate``.
        """

    @abstractmethod
    def stream(self, generator: torch.Generator | None = None) -> AudioStream:
        """A fresh streaming decoder; several may be open at once."""


def is_continuous_kind(kind: str) -> bool:
    """Whether codecs of this kind feed user speech to the model as continuous features.

    Such kinds are named ``sensevoice_<discrete kind>``: SenseVoice features in, discrete
    codes out.
    """
    return kind.startswith("sensevoice_")
