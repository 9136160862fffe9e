"""The GLM-4-Voice codec behind the project's codec interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from vita_audio.audio.base import AudioLike, AudioTokenizer
from vita_audio.audio.glm4voice.config import load_decoder_config
from vita_audio.audio.glm4voice.flow import DEFAULT_SEED, FlowDecoder
from vita_audio.audio.glm4voice.streaming import (
    GLM4VoiceStream,
    StreamingDecoder,
    StreamSchedule,
    check_codes,
    push_streams,
)
from vita_audio.audio.glm4voice.vocoder import Vocoder
from vita_audio.audio.glm4voice.vq_encoder import SAMPLE_RATE, VQEncoder
from vita_audio.audio.glm4voice.weights import WeightsError, content_fingerprint
from vita_audio.audio.io import load_audio

_Part = TypeVar("_Part", bound=nn.Module)


class GLM4VoiceTokenizer(AudioTokenizer):
    """Speech to GLM-4-Voice codes and back.

    Nothing is loaded before it is used, and what is loaded does not travel when the codec is pickled: so
    a codec can be handed to loader workers, each of which opens the weights for itself.

    Args:
        path: folder of the tokenizer (``config.json``, ``model.safetensors``, ``preprocessor_config.json``).
        flow_path: folder of the decoder (``config.yaml``, ``flow.pt``, ``hift.pt``); needed to decode.
        device: where to compute.
        encoder_dtype: of the tokenizer network.
        schedule: chunks and steps of streaming decoding.
    """

    kind = "glm4voice"

    def __init__(
        self,
        path: str | PathLike[str],
        flow_path: str | PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
        schedule: StreamSchedule | None = None,
    ):
        self.path = Path(path)
        self.flow_path = None if flow_path is None else Path(flow_path)
        self.device = torch.device(device)
        self.encoder_dtype = encoder_dtype
        self.schedule = schedule or StreamSchedule()
        self._parts: dict[type[nn.Module], nn.Module] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str] | None,
        *,
        flow_path: str | PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        **options,
    ) -> GLM4VoiceTokenizer:
        """Open the released folders; ``options`` as in the constructor.

        Raises:
            WeightsError: a folder is not given or does not exist.
        """
        if path is None:
            raise WeightsError("the glm4voice codec needs the folder of the tokenizer's weights")
        for folder in (path, flow_path):
            if folder is not None and not Path(folder).is_dir():
                raise WeightsError(f"{folder}: no such folder of GLM-4-Voice weights")
        return cls(path, flow_path, device, **options)

    @cached_property
    def sample_rate(self) -> int:
        """Of decoded audio, in Hz."""
        return 22050 if self.flow_path is None else load_decoder_config(self.flow_path).vocoder.sampling_rate

    @cached_property
    def codebook_size(self) -> int:
        """Number of codes of the encoder."""
        config = self.path / "config.json"
        if not config.is_file():
            raise WeightsError(f"{self.path}: config.json is missing; point it at the tokenizer's folder")
        return json.loads(config.read_text(encoding="utf-8"))["quantize_vocab_size"]

    @cached_property
    def fingerprint(self) -> str:
        """``glm4voice-`` and a digest of the encoder's files; the same wherever they lie."""
        names = ("config.json", "preprocessor_config.json", "model.safetensors")
        digest = content_fingerprint(self.path / name for name in names)
        return f"{self.kind}-{digest}" + ("" if self.encoder_dtype == torch.float32 else "-low-precision")

    @property
    def encoder(self) -> VQEncoder:
        """The tokenizer network."""
        return self._part(
            VQEncoder,
            lambda: VQEncoder.from_pretrained(self.path, device=self.device, dtype=self.encoder_dtype),
        )

    @property
    def flow(self) -> FlowDecoder:
        """Codes to mel."""
        return self._part(
            FlowDecoder, lambda: FlowDecoder.from_pretrained(self._decoder_folder(), device=self.device)
        )

    @property
    def vocoder(self) -> Vocoder:
        """Mel to waveform."""
        return self._part(
            Vocoder, lambda: Vocoder.from_pretrained(self._decoder_folder(), device=self.device)
        )

    def encode(self, audio: AudioLike) -> list[int]:
        """Speech to codes, 12.5 a second; see :meth:`AudioTokenizer.encode`."""
        return self.encode_batch([audio])[0]

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        """Codes of several clips of any length, rate and channel count (the first channel is used)."""
        waveforms = [load_audio(audio, SAMPLE_RATE, channels="first")[0] for audio in audios]
        return self.encoder.encode(waveforms)

    @torch.no_grad()
    def decode(
        self, tokens: Sequence[int], steps: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        """Codes to speech in one piece (section 7.1); see :meth:`AudioTokenizer.decode`."""
        check_codes(tokens, self.flow.config.vocab_size)
        if len(tokens) == 0:
            return torch.empty(0)
        generator = generator or torch.Generator().manual_seed(DEFAULT_SEED)
        mel = self.flow(torch.as_tensor(tokens, dtype=torch.long), steps=steps, generator=generator)
        waveform, _ = self.vocoder(mel, generator=generator)
        return waveform[0].float().cpu()

    def stream(
        self, generator: torch.Generator | None = None, schedule: StreamSchedule | None = None
    ) -> GLM4VoiceStream:
        """A fresh reply; ``schedule`` replaces the codec's own."""
        schedule = schedule or self.schedule
        decoder = StreamingDecoder(self.flow, self.vocoder, schedule.prompt_tokens)
        return GLM4VoiceStream(decoder, schedule, generator)

    def push_streams(
        self,
        streams: Sequence[GLM4VoiceStream],
        tokens: Sequence[Sequence[int]],
        last: Sequence[bool],
    ) -> list[Tensor]:
        """Push to several streams of this codec at once, in shared batches."""
        return push_streams(streams, tokens, last)

    def _decoder_folder(self) -> Path:
        if self.flow_path is None:
            raise WeightsError("decoding needs the folder of the decoder's weights: give flow_path")
        return self.flow_path

    def _part(self, kind: type[_Part], load: Callable[[], _Part]) -> _Part:
        with self._lock:
            if kind not in self._parts:
                self._parts[kind] = load()
            return self._parts[kind]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_parts", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _parts={}, _lock=threading.Lock())
