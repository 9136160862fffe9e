"""The GLM-4-Voice codec, with the project's codec interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vita_audio.audio.base import AudioLike, AudioStream, AudioTokenizer, check_codes
from vita_audio.audio.folders import GLM4VOICE_DECODER, GLM4VOICE_TOKENIZER, check_folder
from vita_audio.audio.glm4voice.config import CONFIG_FILES, load_decoder_config
from vita_audio.audio.glm4voice.flow import DEFAULT_SEED, ROWS_PER_PASS, FlowDecoder
from vita_audio.audio.glm4voice.streaming import (
    REPLY_SCHEDULE,
    GLM4VoiceStream,
    StreamingDecoder,
    StreamSchedule,
    push_many,
)
from vita_audio.audio.glm4voice.vocoder import Vocoder
from vita_audio.audio.glm4voice.vq_encoder import SAMPLE_RATE, EncoderStream, VQEncoder
from vita_audio.audio.glm4voice.weights import WeightsError, find_weights
from vita_audio.audio.io import load_audio
from vita_audio.files import content_fingerprint

_ENCODER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_FINGERPRINTED = ("config.json", "preprocessor_config.json", "model.safetensors")  # the order is kept
_DECODER_FILES = (CONFIG_FILES, ("flow.safetensors", "flow.pt"), ("hift.safetensors", "hift.pt"))
_Part = TypeVar("_Part", bound=nn.Module)


class GLM4VoiceTokenizer(AudioTokenizer):
    """Speech to GLM-4-Voice codes and back.

    Weights are loaded on first use and are not pickled: a codec can be sent to loader workers, and each of them
    opens the weights itself.

    Args:
        path: folder of the tokenizer (``config.json``, ``model.safetensors``, ``preprocessor_config.json``);
            None to decode only.
        flow_path: folder of the decoder (``config.yaml``, ``flow.pt``, ``hift.pt``); None to
            encode only.
        device: device of the networks.
        encoder_dtype: data type of the tokenizer network.
        schedule: chunks and steps of streaming decoding; defaults to :data:`REPLY_SCHEDULE`.
    """

    kind = "glm4voice"
    input_sample_rate = SAMPLE_RATE

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        flow_path: str | PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
        schedule: StreamSchedule | None = None,
    ):
        self.path = None if path is None else Path(path)
        self.flow_path = None if flow_path is None else Path(flow_path)
        self.device = torch.device(device)
        self.encoder_dtype = encoder_dtype
        self.schedule = schedule or REPLY_SCHEDULE
        self._parts: dict[type[nn.Module], nn.Module] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        flow_path: str | PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        encoder_dtype: torch.dtype = torch.float32,
        schedule: StreamSchedule | None = None,
    ) -> GLM4VoiceTokenizer:
        """Open the released folders; arguments as in the constructor.

        Raises:
            WeightsError: neither folder is given, or one does not exist, is incomplete, or holds other files.
        """
        if path is None and flow_path is None:
            raise WeightsError(
                "the glm4voice codec needs the folder of the tokenizer's weights to encode, "
                "or the decoder's (flow_path) to decode; neither was given"
            )
        if path is not None:
            check_folder(path, GLM4VOICE_TOKENIZER, cls.kind, _ENCODER_FILES)
        if flow_path is not None:
            check_folder(flow_path, GLM4VOICE_DECODER, cls.kind, _DECODER_FILES)
        return cls(path, flow_path, device, encoder_dtype, schedule)

    @cached_property
    def sample_rate(self) -> int:  # type: ignore[override]  # read from a file on first use
        """Of decoded audio, in Hz."""
        return 22050 if self.flow_path is None else load_decoder_config(self.flow_path).vocoder.sampling_rate

    @cached_property
    def codebook_size(self) -> int:  # type: ignore[override]  # read from a file on first use
        """Number of codes."""
        if self.path is None:
            return load_decoder_config(self._decoder_folder()).flow.vocab_size
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return int(config["quantize_vocab_size"])

    @cached_property
    def fingerprint(self) -> str:
        """``glm4voice-`` and a digest of the encoder's files; independent of their location.

        A codec that only decodes makes no codes; its fingerprint identifies the decoder's weights.
        """
        if self.path is None:
            folder = self._decoder_folder()
            weights = content_fingerprint(find_weights(folder, stem) for stem in ("flow", "hift"))
            return f"{self.kind}-decoder-{weights}"
        digest = content_fingerprint(self.path / name for name in _FINGERPRINTED)
        return f"{self.kind}-{digest}" + ("" if self.encoder_dtype == torch.float32 else "-low-precision")

    @property
    def encoder(self) -> VQEncoder:
        """The tokenizer network."""
        return self._part(
            VQEncoder,
            lambda: VQEncoder.from_pretrained(
                self._encoder_folder(), device=self.device, dtype=self.encoder_dtype
            ),
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

    def load_encoder(self) -> None:
        """See :meth:`AudioTokenizer.load_encoder`."""
        _ = self.encoder

    def encode(self, audio: AudioLike) -> list[int]:
        """Speech to codes, 12.5 a second; see :meth:`AudioTokenizer.encode`."""
        return self.encode_batch([audio])[0]

    def encode_batch(self, audios: Sequence[AudioLike]) -> list[list[int]]:
        """Codes of several clips of any length, rate and channel count (the first channel is used)."""
        self._encoder_folder()  # a codec that only decodes fails here, before reading audio
        waveforms = [load_audio(audio, SAMPLE_RATE, channels="first")[0] for audio in audios]
        return self.encoder.encode(waveforms)

    def encode_stream(self, sample_rate: int | None = None) -> EncoderStream:
        """See :meth:`AudioTokenizer.encode_stream`; codes come in blocks of 4 s.

        They differ from the offline codes only if later, louder speech raises the loudness floor of the
        features; see :class:`EncoderStream`.
        """
        return self.encoder.stream(sample_rate or SAMPLE_RATE)

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

    def push_many(
        self, streams: Sequence[AudioStream], tokens: Sequence[Sequence[int]], last: Sequence[bool]
    ) -> list[Tensor]:
        """See :meth:`AudioTokenizer.push_many`; chunks that are due together share a batch."""
        own = [stream for stream in streams if isinstance(stream, GLM4VoiceStream)]
        if len(own) != len(streams):
            raise TypeError("push_many accepts only streams returned by this codec's stream()")
        return push_many(own, tokens, last)

    def sharing(self, streams: Sequence[AudioStream]) -> Sequence[AudioStream]:
        """See :meth:`AudioTokenizer.sharing`; on a CPU nothing is shared, see :meth:`FlowDecoder.generate`."""
        own = [stream for stream in streams if isinstance(stream, GLM4VoiceStream)]
        rows = ROWS_PER_PASS if self.flow.shares_passes else 1
        return [stream for stream in own if stream.pass_key == own[0].pass_key][:rows]

    def _encoder_folder(self) -> Path:
        if self.path is None:
            raise WeightsError("this glm4voice codec only decodes: encoding needs the tokenizer's folder")
        return self.path

    def _decoder_folder(self) -> Path:
        if self.flow_path is None:
            raise WeightsError(
                "this glm4voice codec only encodes: decoding needs the decoder's folder, flow_path"
            )
        return self.flow_path

    def _part(self, kind: type[_Part], load: Callable[[], _Part]) -> _Part:
        with self._lock:
            part = self._parts.get(kind)
            if not isinstance(part, kind):
                part = self._parts[kind] = load()
            return part

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_parts", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _parts={}, _lock=threading.Lock())
