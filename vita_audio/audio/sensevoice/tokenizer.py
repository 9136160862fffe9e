"""A codec with two mouths: SenseVoice features in, another codec's tokens out.

The Plus models hear the user through continuous features and answer in discrete codes.
Composition, not a codec of its own: everything but :meth:`features` is the discrete codec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch

from vita_audio.audio.base import AudioLike, AudioStream, AudioTokenizer
from vita_audio.audio.sensevoice.frontend import Frontend


class SenseVoiceInputTokenizer(AudioTokenizer):
    """``discrete`` with SenseVoice features for what the model listens to.

    Args:
        discrete: the codec of the speech that the model says.
        frontend_path: ``am.mvn`` or its folder.
        dither: see :class:`~vita_audio.audio.sensevoice.frontend.Frontend`.

    Raises:
        ValueError: no ``frontend_path``.
        FileNotFoundError: it holds no ``am.mvn``.
    """

    def __init__(
        self,
        discrete: AudioTokenizer,
        frontend_path: str | PathLike[str] | None,
        dither: float = 0.0,
    ) -> None:
        self.kind = f"sensevoice_{discrete.kind}"
        if frontend_path is None:
            raise ValueError(f"the {self.kind} codec needs frontend_path, the folder of SenseVoice's am.mvn")
        self.discrete = discrete
        self.frontend = Frontend(frontend_path, dither)
        self.sample_rate = discrete.sample_rate
        self.frame_rate = discrete.frame_rate
        self.codebook_size = discrete.codebook_size

    @property
    def fingerprint(self) -> str:
        """The discrete codec's: cached codes serve both families."""
        return self.discrete.fingerprint

    @property
    def feature_fingerprint(self) -> str:
        """Short stable name of the front end; keys caches of features."""
        return self.frontend.fingerprint

    def features(self, audio: AudioLike) -> torch.Tensor:
        return self.frontend(audio)

    def encode(self, audio: AudioLike) -> list[int]:
        return self.discrete.encode(audio)

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        return self.discrete.encode_batch(audios)

    def decode(
        self,
        tokens: Sequence[int],
        steps: int = 10,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        return self.discrete.decode(tokens, steps, generator)

    def stream(self, generator: torch.Generator | None = None) -> AudioStream:
        return self.discrete.stream(generator)
