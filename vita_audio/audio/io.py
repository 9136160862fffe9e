"""Audio files to float tensors and back.

Every clip of the project enters here, whatever its format, rate and channel count, and bad clips are
refused here: :class:`AudioError` says in one line which file and why, and carries a short ``reason``
that callers can count.

The resampler is part of the codecs' numeric contract: tokens and features are defined on its output
(windowed sinc, width 6, roll-off 0.99, Hann; section 1.1 of the GLM-4-Voice specification and
section 2.1 of the SenseVoice one).
"""

from __future__ import annotations

import math
import re
import shutil
from functools import lru_cache
from os import PathLike, fspath
from pathlib import Path
from typing import Literal

import audioread
import numpy as np
import soundfile
import torch
from torch import Tensor

from vita_audio.audio.base import AudioLike

_LOWPASS_WIDTH = 6
_ROLLOFF = 0.99
_OUTPUTS_PER_SLICE = 1 << 18  # bounds the resampler's memory on long recordings
# A lossy header only estimates the length, so only a clear shortfall counts as truncation.
_LOSSY_LENGTH_TOLERANCE = 0.05
_LENGTH_UNKNOWN = 0xFFFFFFFF  # written by encoders that stream into a pipe


class AudioError(ValueError):
    """Audio that cannot be used.

    Attributes:
        reason: ``"missing"``, ``"empty"``, ``"unreadable"``, ``"truncated"``, ``"nan"`` (not finite),
            ``"shape"``, ``"dtype"`` or ``"rate"``.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


def load_audio(
    audio: AudioLike, sample_rate: int | None = None, channels: Literal["mean", "first"] = "mean"
) -> tuple[Tensor, int]:
    """Read a clip as one channel.

    Args:
        audio: a path, or ``(waveform, rate)`` with a float waveform of shape (samples,) or
            (channels, samples).
        sample_rate: wanted rate in Hz; the clip's own when absent.
        channels: what becomes of several channels: their mean, or the first alone.

    Returns:
        Waveform of shape (samples,), float32, about [-1, 1], on the CPU, and its rate.

    Raises:
        AudioError: the clip is missing, empty, truncated, unreadable or not finite.
    """
    if channels not in ("mean", "first"):
        raise ValueError(f"channels must be 'mean' or 'first', got {channels!r}")
    if isinstance(audio, (str, PathLike)):
        name = fspath(audio)
        waveform, rate = _read_file(Path(name))
    else:
        name = "in-memory audio"
        waveform, rate = _check_memory(audio)
    if waveform.shape[-1] == 0:
        raise AudioError(f"{name}: holds no samples", "empty")
    # Both rules act on each channel alike, so choosing the channel first is exact and resamples once.
    mono = waveform[0] if channels == "first" else waveform.mean(dim=0)
    if not torch.isfinite(mono).all():
        raise AudioError(f"{name}: holds samples that are not finite numbers", "nan")
    if sample_rate is None or sample_rate == rate:
        return mono, rate
    return resample(mono, rate, sample_rate), sample_rate


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited resampling along the last dimension (GLM-4-Voice specification, section 1.1).

    Every output sample is a weighted sum of the ``2 * width + 1`` inputs around it; the weights
    depend only on its phase, of which there are ``to_rate / gcd``.

    Args:
        waveform: shape (..., samples), float.
        from_rate: rate of the input in Hz.
        to_rate: rate of the output in Hz.

    Returns:
        Shape (..., ceil(samples * to_rate / from_rate)), same type and device.

    Raises:
        AudioError: a rate is not positive.
    """
    if from_rate < 1 or to_rate < 1:
        raise AudioError(f"sample rates must be positive, got {from_rate} and {to_rate} Hz", "rate")
    if from_rate == to_rate or waveform.shape[-1] == 0:
        return waveform
    divisor = math.gcd(from_rate, to_rate)
    old, new = from_rate // divisor, to_rate // divisor
    weights, first_taps, width = _sinc_filters(old, new)
    weights, first_taps = weights.to(waveform), first_taps.to(waveform.device)

    samples = waveform.shape[-1]
    # The reference rounds the exact length to float32 before it takes the ceiling.
    outputs = math.ceil(np.float32(new * samples / old))
    padded = torch.nn.functional.pad(waveform, (width, 2 * (width + old)))
    windows = padded.unfold(-1, 2 * width + 1, 1)
    pieces = []
    for start in range(0, outputs, _OUTPUTS_PER_SLICE):
        position = torch.arange(start, min(start + _OUTPUTS_PER_SLICE, outputs), device=waveform.device)
        phase = position % new
        first = position // new * old + first_taps[phase] + width
        pieces.append((windows[..., first, :] * weights[phase]).sum(-1))
    return torch.cat(pieces, dim=-1)


def save_audio(path: str | PathLike[str], waveform: Tensor, rate: int) -> None:
    """Write a waveform of shape (samples,) or (channels, samples) in [-1, 1]; the suffix sets the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = waveform.detach().to("cpu", torch.float32).clamp(-1, 1)
    try:
        soundfile.write(path, samples.numpy().T, rate)
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise AudioError(f"{path}: cannot be written: {error}", "unreadable") from error


def audio_duration(path: str | PathLike[str]) -> float:
    """Seconds of a file as its header states them; nothing is decoded.

    Raises:
        AudioError: the file is missing or its header cannot be read.
    """
    path = Path(path)
    _check_present(path)
    try:
        info = soundfile.info(path)
        return info.frames / info.samplerate
    except soundfile.LibsndfileError as error:
        with _open_with_ffmpeg(path, error) as stream:
            return float(stream.duration)


def _read_file(path: Path) -> tuple[Tensor, int]:
    """All channels of a file, shape (channels, samples)."""
    _check_present(path)
    try:
        info = soundfile.info(path, verbose=True)
    except soundfile.LibsndfileError as error:
        return _read_with_ffmpeg(path, error)
    _check_data_chunk(path, info.extra_info)
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{path}: damaged or cut off after its header: {error}", "truncated") from error
    if len(samples) < (1 - _LOSSY_LENGTH_TOLERANCE) * info.frames:
        raise AudioError(f"{path}: cut off, {len(samples)} of {info.frames} samples are there", "truncated")
    return torch.from_numpy(samples.T.copy()), rate


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file", "missing")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty", "empty")


def _check_data_chunk(path: Path, log: str) -> None:
    """Refuse a wav file shorter than its header says; libsndfile only notes it in its log."""
    for declared, present in re.findall(r"data : (\d+) \(should be (\d+)\)", log):
        if int(present) < int(declared) < _LENGTH_UNKNOWN - (1 << 16):
            raise AudioError(f"{path}: cut off, {present} of {declared} bytes are there", "truncated")


def _read_with_ffmpeg(path: Path, cause: Exception) -> tuple[Tensor, int]:
    """Formats libsndfile does not know (m4a, aac, wma, ...), shape (channels, samples)."""
    with _open_with_ffmpeg(path, cause) as stream:
        try:
            pcm = np.frombuffer(b"".join(stream), dtype="<i2").reshape(-1, stream.channels)
        except (audioread.DecodeError, EOFError, ValueError) as error:
            raise AudioError(f"{path}: cannot be decoded: {error}", "unreadable") from error
        return torch.from_numpy(pcm.T.astype(np.float32) / 32768), stream.samplerate


def _open_with_ffmpeg(path: Path, cause: Exception) -> audioread.AudioFile:
    try:
        return audioread.audio_open(path)
    except (audioread.DecodeError, EOFError, OSError) as error:
        hint = "" if shutil.which("ffmpeg") else "; if it is M4A, AAC or the like, install ffmpeg"
        raise AudioError(f"{path}: not a readable audio file: {cause}{hint}", "unreadable") from error


def _check_memory(audio: tuple[Tensor, int]) -> tuple[Tensor, int]:
    """Check ``(waveform, rate)`` and return the waveform as (channels, samples), float32."""
    try:
        waveform, rate = audio
    except (TypeError, ValueError):
        raise AudioError(
            f"audio must be a path or (waveform, sample_rate), got {type(audio).__name__}", "shape"
        ) from None
    waveform, rate = torch.as_tensor(waveform).detach().cpu(), int(rate)
    if rate < 1:
        raise AudioError(f"in-memory audio: sample rate must be positive, got {rate} Hz", "rate")
    if not waveform.is_floating_point():
        raise AudioError(
            f"in-memory audio: samples must be floats in [-1, 1], got {waveform.dtype}; scale them first",
            "dtype",
        )
    if waveform.dim() not in (1, 2):
        raise AudioError(
            f"in-memory audio: expected (samples,) or (channels, samples), got {tuple(waveform.shape)}",
            "shape",
        )
    return torch.atleast_2d(waveform).float(), rate


@lru_cache(maxsize=16)
def _sinc_filters(old: int, new: int) -> tuple[Tensor, Tensor, int]:
    """Filters from ``old`` to ``new`` samples (coprime).

    Returns:
        weights (new, 2 * width + 1), the input index of each phase's first weight (new,), and width.
    """
    cutoff = _ROLLOFF * min(old, new)
    width = math.ceil(_LOWPASS_WIDTH * old / cutoff)
    phase = torch.arange(new)
    first_tap = phase * old // new - width
    tap = first_tap[:, None] + torch.arange(2 * width + 1)
    # The reference rounds the phase to float32 and computes the rest in float64.
    offset = (-phase.float() / new).double()
    t = (cutoff * (tap.double() / old + offset[:, None])).clamp(-_LOWPASS_WIDTH, _LOWPASS_WIDTH)
    window = torch.cos(t * math.pi / (2 * _LOWPASS_WIDTH)) ** 2
    return (torch.sinc(t) * window * (cutoff / old)).float(), first_tap, width
