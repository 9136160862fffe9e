"""Speech to codes: 16 kHz to 12.5 codes a second (section 3 of the GLM-4-Voice specification).

A streamable Whisper encoder. Both stem convolutions look left only, attention sees the past and its own
4 s block, four states are averaged into one, and the index of the nearest codebook row is the code.
Speech is cut into independent segments of 30 s. The layers and the log-mel front end are transformers'
Whisper; the stem, the mask, pooling and the codebook are here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

from vita_audio.audio.base import EncodeStream
from vita_audio.audio.glm4voice.weights import WeightsError, load_strictly, read_state_dict
from vita_audio.audio.memory import to_piece
from vita_audio.audio.resampling import StreamResampler

SAMPLE_RATE = 16000
SEGMENT_SAMPLES = 30 * SAMPLE_RATE
_HOP = 160
_STEM_STRIDE = 2
_STATES_PER_SLICE = 2048  # bounds the (states, codes) distance matrix
_NEVER_READ = ("ema_count", "ema_weight")  # statistics of codebook training
_CHECKPOINT_PREFIX = "model.encoder."


class VQEncoder(nn.Module):
    """Speech to codes.

    Built with random weights from a configuration, or with :meth:`from_pretrained` from a folder that
    holds ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.

    Args:
        config: Whisper configuration with the released folder's extra keys (``pooling_kernel_size``,
            ``quantize_position``, ...).
        feature_extractor: log-mel front end; defaults to Whisper's with ``config.num_mel_bins`` bins.

    Raises:
        ValueError: the configuration asks for a variant that the released tokenizer does not use.
    """

    def __init__(self, config: WhisperConfig, feature_extractor: WhisperFeatureExtractor | None = None):
        super().__init__()
        _check_config(config)
        config._attn_implementation = "sdpa"
        width, self.pool = config.d_model, config.pooling_kernel_size
        self.config = config
        self.feature_extractor = feature_extractor or WhisperFeatureExtractor(config.num_mel_bins)
        self.causal_stem = config.encoder_causal_convolution
        padding = 0 if self.causal_stem else 1
        self.register_buffer("ema_count", torch.ones(config.quantize_vocab_size))
        self.register_buffer("ema_weight", torch.zeros(config.quantize_vocab_size, width))
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, kernel_size=3, padding=padding)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=_STEM_STRIDE, padding=padding)
        self.embed_positions = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(WhisperEncoderLayer(config) for _ in range(config.quantize_position))
        self.codebook = nn.Embedding(config.quantize_vocab_size, width)
        self.embed_positions2 = nn.Embedding(-(-config.max_source_positions // self.pool), width)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> VQEncoder:
        """Load the released folder.

        Args:
            folder: holds ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``.
            device: where to compute.
            dtype: of the network; the codebook search stays in float32.

        Raises:
            WeightsError: a file is missing or damaged, or a key or shape differs from the configuration.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise WeightsError(f"{folder}: {name} is missing; give the tokenizer's folder")
        config = WhisperConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        with torch.device("meta"):
            encoder = cls(config, extractor)
        path = folder / "model.safetensors"
        load_strictly(encoder, encoder._without_prefix(read_state_dict(path)), path, ignore=_NEVER_READ)
        # Never read again; at released sizes they take 84 MB.
        del encoder.ema_count, encoder.ema_weight
        for part in (encoder.conv1, encoder.conv2, encoder.embed_positions, encoder.layers):
            part.to(dtype)
        return encoder.to(device)

    @property
    def samples_per_token(self) -> int:
        """Input samples per code: 1280 in the released model."""
        return _HOP * _STEM_STRIDE * self.pool

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor], batch_size: int = 32) -> list[list[int]]:
        """Codes of several clips, equal to encoding them one by one.

        Args:
            waveforms: each of shape (samples,), or (channels, samples) of which the first is used; float,
                16 kHz, any length.
            batch_size: segments of 30 s that share one pass.

        Returns:
            For each clip ``ceil(samples / 1280)`` codes (counted per segment); none for no samples.
        """
        segments = [segment for waveform in waveforms for segment in _segments(waveform)]
        # Segments of similar length share a pass, which keeps padding small.
        order = sorted(range(len(segments)), key=lambda index: len(segments[index]))
        codes: list[list[int]] = [[] for _ in segments]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = self(*self.features([segments[index] for index in chosen]))
            for index, row in zip(chosen, rows.tolist(), strict=True):
                codes[index] = row[: -(-len(segments[index]) // self.samples_per_token)]
        remaining = iter(codes)
        return [[code for _ in _segments(waveform) for code in next(remaining)] for waveform in waveforms]

    def stream(self, sample_rate: int = SAMPLE_RATE) -> EncoderStream:
        """A fresh streaming encoder for clips whose pieces have this rate in Hz."""
        return EncoderStream(self, sample_rate)

    def features(self, waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-mel features of clips, one row per segment of 30 s (section 2).

        Each segment is padded to whole codes first and then to the longest of the batch, with the row's value for
        silence. Features and codes therefore do not depend on the other clips of the batch.

        Args:
            waveforms: each of shape (samples,), 16 kHz, at least one sample.

        Returns:
            input_features (rows, mel bins, frames), float32, and mask (rows, frames) that is True at
            frames of real audio; both on the module's device.
        """
        device = self.conv1.weight.device
        features, masks = [], []
        for segment in (segment for waveform in waveforms for segment in _segments(waveform)):
            extracted = self.feature_extractor(
                segment.cpu().numpy(),
                sampling_rate=SAMPLE_RATE,
                padding="longest",
                pad_to_multiple_of=self.samples_per_token,
                return_attention_mask=True,
                return_tensors="pt",
                device=str(device),
            )
            features.append(extracted["input_features"][0])
            masks.append(extracted["attention_mask"][0].bool())
        frames = max(len(mask) for mask in masks)
        input_features = torch.stack(
            [F.pad(row, (0, frames - row.shape[1]), value=_silence_in(row)) for row in features]
        )
        mask = torch.stack([F.pad(row, (0, frames - len(row))) for row in masks])
        return input_features.to(device), mask.to(device)

    @torch.no_grad()
    def forward(self, input_features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of feature rows.

        Args:
            input_features: (rows, mel bins, frames).
            mask: (rows, frames), non-zero at real frames; None if all are.

        Returns:
            Codes (rows, ceil(frames / 8)), long; those at padding are meaningless.
        """
        return self.quantize(self.prequant(input_features, mask))

    def prequant(self, input_features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Input states of the quantiser, (rows, codes, d_model), float32; arguments as ``forward``."""
        return self.hidden_states(input_features, mask)[-1].float()

    @torch.no_grad()
    def hidden_states(self, input_features: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Input of each layer in turn, then the output of the last; arguments as ``forward``."""
        if mask is None:
            mask = input_features.new_ones(input_features.shape[0], input_features.shape[2])
        hidden = self._stem(input_features.to(self.conv1.weight.dtype))
        keys = mask.bool()[:, ::_STEM_STRIDE]
        block = self.config.quantize_causal_block_size
        allowed = _block_causal_mask(keys, block)
        states = [hidden]
        for position, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, allowed)
            if position == self.config.pooling_position:
                hidden = self._pool(hidden)
                keys = keys[:, :: self.pool]
                allowed = _block_causal_mask(keys, max(1, block // self.pool))
            states.append(hidden)
        return states

    def quantize(self, states: Tensor) -> Tensor:
        """Index of the nearest codebook row by Euclidean distance, lowest on ties; (..., d) to (...)."""
        rows = self.codebook.weight
        row_norms = rows.square().sum(-1)
        codes = [
            (part.square().sum(-1, keepdim=True) + row_norms - 2 * part @ rows.T).argmin(-1)
            for part in states.flatten(0, -2).split(_STATES_PER_SLICE)
        ]
        return torch.cat(codes).view(states.shape[:-1])

    def dequantize(self, codes: Tensor) -> Tensor:
        """Output states of the tokenizer network, codebook row plus position; (rows, codes, d_model)."""
        return self.codebook(codes) + self.embed_positions2.weight[: codes.shape[1]]

    def _stem(self, features: Tensor) -> Tensor:
        """(rows, mel bins, frames) to (rows, frames / 2, d_model)."""
        hidden = features
        for conv in (self.conv1, self.conv2):
            hidden = F.gelu(conv(F.pad(hidden, (2, 0)) if self.causal_stem else hidden))
        hidden = hidden.transpose(1, 2)
        if hidden.shape[1] > len(self.embed_positions.weight):
            raise ValueError(f"{hidden.shape[1]} positions exceed {len(self.embed_positions.weight)}")
        return hidden + self.embed_positions.weight[: hidden.shape[1]]

    def _pool(self, hidden: Tensor) -> Tensor:
        hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.pool))
        return F.avg_pool1d(hidden.transpose(1, 2), self.pool).transpose(1, 2)

    def _without_prefix(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights under this module's keys, from a checkpoint of the encoder or of the whole model."""
        if not any(key.startswith(_CHECKPOINT_PREFIX) for key in state):
            return state
        unused = tuple(
            f"layers.{index}." for index in range(self.config.quantize_position, self.config.encoder_layers)
        )
        stripped = {
            key.removeprefix(_CHECKPOINT_PREFIX): value
            for key, value in state.items()
            if key.startswith(_CHECKPOINT_PREFIX)
        }
        return {key: value for key, value in stripped.items() if not key.startswith((*unused, "layer_norm."))}


class EncoderStream(EncodeStream):
    """Codes of speech that is still being recorded.

    Codes are returned when their attention block (4 s) is complete, and never change afterwards. They equal
    the offline codes of the audio so far. Later audio could affect them in only one way: the
    features have a floor 80 dB below the loudest frame of the segment.
    A finished segment of 30 s is discarded, so memory and cost per block stay bounded.

    Args:
        encoder: the tokenizer network.
        sample_rate: of the pieces in Hz.
    """

    def __init__(self, encoder: VQEncoder, sample_rate: int = SAMPLE_RATE):
        self._encoder = encoder
        self._resampler = StreamResampler(sample_rate, SAMPLE_RATE)
        self._heard = torch.empty(0)  # samples of the segment in progress, at 16 kHz
        self._emitted = 0  # codes of that segment already returned

    def push(self, waveform: Tensor | np.ndarray, last: bool = False) -> list[int]:
        """See :meth:`EncodeStream.push`."""
        self._heard = torch.cat([self._heard, self._resampler.push(to_piece(waveform), last)])
        codes: list[int] = []
        while len(self._heard) > SEGMENT_SAMPLES or (len(self._heard) == SEGMENT_SAMPLES and last):
            codes += self._take(self._heard[:SEGMENT_SAMPLES], final=True)
            self._heard, self._emitted = self._heard[SEGMENT_SAMPLES:], 0
        if len(self._heard):
            codes += self._take(self._heard, final=last)
        if last:
            self._heard, self._emitted = torch.empty(0), 0
        return codes

    def _take(self, segment: Tensor, final: bool) -> list[int]:
        complete = (
            -(-len(segment) // self._encoder.samples_per_token) if final else self._complete(len(segment))
        )
        if complete <= self._emitted:
            return []
        codes = self._encoder.encode([segment])[0][self._emitted : complete]
        self._emitted = complete
        return codes

    def _complete(self, samples: int) -> int:
        """Number of codes whose block is entirely within the first ``samples``."""
        config, pool = self._encoder.config, self._encoder.pool
        # A frame's window reaches half an FFT past its centre.
        frames = max(0, samples - self._encoder.feature_extractor.n_fft // 2) // _HOP + 1
        block = config.quantize_causal_block_size
        codes = frames // _STEM_STRIDE // block * block // pool
        pooled_block = max(1, block // pool) if config.pooling_position < config.quantize_position else 1
        return codes // pooled_block * pooled_block


def released_config() -> WhisperConfig:
    """Sizes of the released tokenizer (section 8), for building it without its weights."""
    settings: dict[str, Any] = {  # some of these keys are specific to this tokenizer
        "d_model": 1280,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "encoder_causal_convolution": True,
        "encoder_causal_attention": False,
        "pooling_kernel_size": 4,
        "pooling_type": "avg",
        "pooling_position": 16,
        "quantize_position": 16,
        "quantize_vocab_size": 16384,
        "quantize_causal_block_size": 200,
        "quantize_causal_encoder": False,
        "quantize_encoder_only": True,
    }
    return WhisperConfig(**settings)


def _check_config(config: WhisperConfig) -> None:
    """Refuse variants that the released tokenizer does not use."""
    wanted = {
        "encoder_causal_attention": (False, None),
        "quantize_causal_encoder": (False, None),
        "quantize_encoder_only": (True,),
        "pooling_type": ("avg",),
    }
    for key, allowed in wanted.items():
        if getattr(config, key, allowed[0]) not in allowed:
            raise ValueError(
                f"config.json: {key}={getattr(config, key)!r} is not supported; use {allowed[0]!r}"
            )
    for key in ("pooling_kernel_size", "pooling_position", "quantize_position", "quantize_causal_block_size"):
        value = getattr(config, key, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json: {key} must be a positive integer, got {value!r}")
    if config.pooling_position > config.quantize_position:
        raise ValueError(
            f"config.json: pooling_position={config.pooling_position} comes after "
            f"quantize_position={config.quantize_position}"
        )


def _segments(waveform: Tensor) -> Sequence[Tensor]:
    """Segments of 30 s, the last one shorter; none for no samples. Of several channels the first is used."""
    samples = waveform[0] if waveform.dim() == 2 else waveform
    return samples.float().split(SEGMENT_SAMPLES) if len(samples) else ()


def _silence_in(features: Tensor) -> float:
    """The value of zero samples in a row of log-mel features: the floor of -10, or 8 below the loudest bin."""
    return max(float(features.max()) - 2.0, (-10.0 + 4.0) / 4.0)


def _block_causal_mask(keys: Tensor, block: int) -> Tensor:
    """Which key each query may see: the past and its own block, real frames only.

    Args:
        keys: (rows, time), True at real frames.
        block: frames per block.

    Returns:
        (rows, 1, time, time), True where attention is allowed.
    """
    position = torch.arange(keys.shape[1], device=keys.device)
    past = position[None, :] <= position[:, None]
    same_block = position[None, :] // block == position[:, None] // block
    return (past | same_block) & keys[:, None, None, :]
