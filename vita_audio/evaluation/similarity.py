"""How alike two voices are: the cosine of speaker embeddings (SIM of Seed-TTS).

* ``wavlm``: the published measure. An ECAPA-TDNN (Desplanques et al., 2020) over a weighted sum of the layers of
  WavLM-Large (Chen et al., 2022), both in ``wavlm_large_finetune.pth``.
* ``spectral``: mean and spread of cepstral coefficients, without weights. It tells apart the few voices of the
  quickstart; its numbers say nothing beside published ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vita_audio.audio import load_audio
from vita_audio.evaluation.transcribers import RECOGNISER_RATE
from vita_audio.files import content_fingerprint

SPEAKER_MODELS = ("wavlm", "spectral")
WAVLM_FILE = "wavlm_large_finetune.pth"


class SpeakerEncoder(ABC):
    """A voice as a vector."""

    def __init__(self) -> None:
        self._embedded = lru_cache(maxsize=512)(self._embed_file)  # a prompt serves several utterances

    @abstractmethod
    def embed(self, waveform: Tensor) -> Tensor:
        """Embedding of 16 kHz speech: (samples,) to (dimensions,)."""

    def similarity(self, said: Path, voice: str) -> float:
        """Cosine of the embeddings of two audio files."""
        one, other = self._embed_file(str(said)), self._embedded(voice)
        return float(torch.cosine_similarity(one, other, dim=0))

    def _embed_file(self, path: str) -> Tensor:
        return self.embed(load_audio(path, RECOGNISER_RATE)[0])


@dataclass(frozen=True)
class SpeakerConfig:
    """Which speaker embedding to open.

    Attributes:
        name: of :data:`SPEAKER_MODELS`.
        path: for ``wavlm``, the file ``wavlm_large_finetune.pth`` or its folder.
        device: device of the network.
    """

    name: str = "wavlm"
    path: str | None = None
    device: str = "cpu"

    def check(self) -> None:
        """
        Raises:
            ValueError: the name is unknown, or the weights are missing.
        """
        if self.name not in SPEAKER_MODELS:
            raise ValueError(f"unknown speaker embedding {self.name!r}; known: {', '.join(SPEAKER_MODELS)}")
        if self.name == "wavlm" and not self._file().is_file():
            raise ValueError(
                f"{self._file()}: no such file; seed-tts-eval's README links it; or give --speaker_model spectral"
            )

    def open(self) -> SpeakerEncoder:
        """The encoder.

        Raises:
            ValueError: see :meth:`check`, or the file holds another network.
        """
        self.check()
        if self.name == "spectral":
            return SpectralEncoder()
        from vita_audio.evaluation.wavlm import WavLMSpeakerEncoder

        return WavLMSpeakerEncoder(self._file(), self.device)

    def fingerprint(self) -> str:
        """A digest of the weights."""
        return self.name if self.name == "spectral" else f"{self.name} {content_fingerprint([self._file()])}"

    def describe(self) -> str:
        """A description for readers of scores."""
        if self.name == "spectral":
            return "cepstral statistics (not comparable with published figures)"
        return f"{self.name}, {self._file().name}"

    def _file(self) -> Path:
        path = Path(self.path or WAVLM_FILE)
        return path / WAVLM_FILE if path.is_dir() else path


class SpectralEncoder(SpeakerEncoder):
    """Mean and standard deviation of mel-cepstral coefficients over the frames that are not silent."""

    _COEFFICIENTS = 20
    _MELS = 40
    _SILENCE = 1e-3  # of the loudest frame's energy

    def embed(self, waveform: Tensor) -> Tensor:
        import librosa

        mel = librosa.feature.melspectrogram(
            y=waveform.numpy(), sr=RECOGNISER_RATE, n_fft=512, hop_length=160, n_mels=self._MELS
        )
        energy = mel.sum(axis=0)
        voiced = mel[:, energy >= self._SILENCE * max(float(energy.max()), 1e-12)]
        # Without the first coefficient, which is loudness.
        cepstra = librosa.feature.mfcc(
            S=librosa.power_to_db(voiced), n_mfcc=self._COEFFICIENTS, sr=RECOGNISER_RATE
        )[1:]
        frames = torch.from_numpy(cepstra)
        return torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)]).float()
