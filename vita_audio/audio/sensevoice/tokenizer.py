"""SenseVoice features in, another codec's tokens out.

The Plus models hear the user through continuous features and answer in discrete codes.
This is composition: everything but the features is the discrete codec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from vita_audio.audio.base import AudioLike, AudioStream, AudioTokenizer, EncodeStream, FeatureStream
from vita_audio.audio.sensevoice.frontend import Frontend


class SenseVoiceInputTokenizer(AudioTokenizer):
    """``discrete`` with SenseVoice features for what the model listens to.

    Args:
        discrete: the codec of the speech that the model says.
        frontend_path: ``am.mvn`` or its folder.
        dither: see :class:`~vita_audio.audio.sensevoice.frontend.Frontend`.
        decode_only: whether ``frontend_path`` may be None; features are then refused.

    Raises:
        FileNotFoundError: ``frontend_path`` holds no ``am.mvn``.
        ValueError: ``am.mvn`` is damaged, or not given.
    """

    def __init__(
        self,
        discrete: AudioTokenizer,
        frontend_path: str | PathLike[str] | None,
        dither: float = 0.0,
        decode_only: bool = False,
    ) -> None:
        self.kind = f"sensevoice_{discrete.kind}"
        if frontend_path is None and not decode_only:
            raise ValueError(f"the {self.kind} codec needs frontend_path, the folder of SenseVoice's am.mvn")
        self.discrete = discrete
        self._frontend = None if frontend_path is None else Frontend(frontend_path, dither)
        self.sample_rate = discrete.sample_rate
        self.input_sample_rate = discrete.input_sample_rate
        self.frame_rate = discrete.frame_rate
        self.codebook_size = discrete.codebook_size
        self.device = discrete.device

    @property
    def frontend(self) -> Frontend:
        """The feature front end.

        Raises:
            ValueError: the codec was opened without one.
        """
        if self._frontend is None:
            raise ValueError(
                f"this {self.kind} codec only decodes: features need frontend_path, the folder of SenseVoice's am.mvn"
            )
        return self._frontend

    @property
    def fingerprint(self) -> str:
        """The discrete codec's: cached codes serve both families."""
        return self.discrete.fingerprint

    @property
    def feature_fingerprint(self) -> str:
        """Short stable name of the front end; keys caches of features."""
        return self.frontend.fingerprint

    def features(self, audio: AudioLike) -> Tensor:
        return self.frontend(audio)

    def feature_stream(self, sample_rate: int | None = None) -> FeatureStream:
        return self.frontend.stream(sample_rate or self.frontend.sample_rate)

    def encode(self, audio: AudioLike) -> list[int]:
        return self.discrete.encode(audio)

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        return self.discrete.encode_batch(audios)

    def encode_stream(self, sample_rate: int | None = None) -> EncodeStream:
        return self.discrete.encode_stream(sample_rate)

    def decode(
        self, tokens: Sequence[int], steps: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.discrete.decode(tokens, steps, generator)

    def stream(self, generator: torch.Generator | None = None) -> AudioStream:
        return self.discrete.stream(generator)

    def push_many(
        self, streams: Sequence[AudioStream], tokens: Sequence[Sequence[int]], last: Sequence[bool]
    ) -> list[Tensor]:
        return self.discrete.push_many(streams, tokens, last)

    def sharing(self, streams: Sequence[AudioStream]) -> Sequence[AudioStream]:
        return self.discrete.sharing(streams)
