"""Audio files to float tensors and back.

Every clip of the project is read here, in any format, rate and channel count, and bad clips are refused here:
:class:`AudioError` names the file and the fault in one line, and has a short ``reason`` that callers count.

Lengths come from the content of a file, not from its header: see :mod:`vita_audio.audio.containers`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from vita_audio.audio.base import AudioError, AudioLike
from vita_audio.audio.containers import Part, find_parts
from vita_audio.audio.memory import MOST_CHANNELS, Clip, check_range, check_rate, identify, one_line
from vita_audio.audio.mp3 import LENGTH_TOLERANCE
from vita_audio.audio.resampling import resample
from vita_audio.files import whole_file

__all__ = ["AudioError", "audio_duration", "load_audio", "resample", "save_audio"]

_UNCHECKED = frozenset({"AVR", "MAT4", "MAT5", "MPC2K", "SDS", "VOC", "WVE", "XI", "SD2"})
"""Formats that libsndfile reads but whose length is not checked here: a truncated file would be accepted silently."""
_FFMPEG_ROUNDING = 0.1  # seconds, relative to the length that audioread reports


def load_audio(
    audio: AudioLike, sample_rate: int | None = None, channels: Literal["mean", "first"] = "mean"
) -> tuple[Tensor, int]:
    """Read a clip as one channel.

    Args:
        audio: the clip, in any form of :data:`~vita_audio.audio.AudioLike`.
        sample_rate: target rate in Hz; None for the clip's own.
        channels: how several channels are combined: their mean, or only the first.

    Returns:
        Waveform of shape (samples,), float32, about [-1, 1], on the CPU, and its rate.

    Raises:
        AudioError: the clip is missing, empty, truncated, unreadable, ambiguous, not finite or not scaled.
    """
    if channels not in ("mean", "first"):
        raise ValueError(f"channels must be 'mean' or 'first', got {channels!r}")
    clip = identify(audio)
    recordings = [(clip.waveform, clip.rate)] if clip.waveform is not None else _read(clip)
    rate = recordings[0][1]
    # Resampling treats all channels alike, so combining channels first is exact and resamples only once.
    pieces = [
        resample(waveform[0] if channels == "first" else waveform.mean(dim=0), own_rate, rate)
        for waveform, own_rate in recordings
    ]
    mono = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if len(mono) == 0:
        raise AudioError(f"{clip.name}: holds no samples", "empty")
    check_range(mono, clip.name)
    if sample_rate is None or sample_rate == rate:
        return mono, rate
    return resample(mono, rate, sample_rate), sample_rate


def save_audio(path: str | PathLike[str], waveform: Tensor, rate: int) -> None:
    """Write a waveform of shape (samples,) or (channels, samples), whole or not at all; the suffix sets the format.

    Args:
        path: file to write; its folder is created.
        waveform: floats in [-1, 1]; values slightly outside are clipped.
        rate: sample rate in Hz.

    Raises:
        AudioError: samples are not finite, not floats or far outside [-1, 1], or the file cannot be written.
    """
    path = Path(path)
    if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
        kind = getattr(waveform, "dtype", type(waveform).__name__)
        raise AudioError(
            f"{path}: not written, samples are {kind}; give a tensor of floats in [-1, 1]", "dtype"
        )
    if waveform.dim() not in (1, 2) or (waveform.dim() == 2 and len(waveform) > MOST_CHANNELS):
        raise AudioError(
            f"{path}: not written; give (samples,) or (channels, samples), not {tuple(waveform.shape)}",
            "shape",
        )
    check_rate(rate, f"{path}: not written")
    samples = waveform.detach().to("cpu", torch.float32)
    check_range(samples, f"{path}: not written, the waveform")
    try:
        with whole_file(path) as temporary:
            container = path.suffix[1:] or "without suffix"
            soundfile.write(temporary, samples.clamp(-1, 1).numpy().T, rate, format=container)
    except (soundfile.LibsndfileError, TypeError, ValueError, OSError) as error:
        raise AudioError(f"{path}: cannot be written: {_said(error)}", "unreadable") from error


def audio_duration(audio: AudioLike) -> float:
    """Duration of a clip in seconds, equal to that of :func:`load_audio`'s result.

    Formats that libsndfile reads are not decoded. Formats that only ffmpeg reads (M4A, AAC, WebM, WMA) are
    decoded, since their headers are rounded, guessed or missing.

    Raises:
        AudioError: the clip is missing, truncated or cannot be read.
    """
    clip = identify(audio)
    if clip.waveform is not None:
        return clip.waveform.shape[-1] / clip.rate
    try:
        return sum(sound.frames / sound.samplerate for sound in _recordings(clip))
    except soundfile.LibsndfileError as error:
        waveform, rate = _read_with_ffmpeg(clip, error)
        return waveform.shape[-1] / rate


def _read(clip: Clip) -> list[tuple[Tensor, int]]:
    """Every recording of an encoded file: all channels, shape (channels, samples), and its rate."""
    try:
        return [(_decode(sound, clip.name), sound.samplerate) for sound in _recordings(clip)]
    except soundfile.LibsndfileError as error:
        return [_read_with_ffmpeg(clip, error)]


def _recordings(clip: Clip) -> Iterator[soundfile.SoundFile]:
    """The recordings of a file, each opened with its true length.

    Raises:
        AudioError: the file is missing, empty or truncated.
        LibsndfileError: libsndfile does not support the format.
    """
    with _open(clip) as file:
        size = file.seek(0, os.SEEK_END)
        for part in find_parts(file, clip.name):
            untouched = clip.path is not None and part == Part(0, size)
            with soundfile.SoundFile(clip.path if untouched else _MemoryFile(part.read(file))) as sound:
                check_rate(sound.samplerate, clip.name)
                if sound.format in _UNCHECKED:
                    raise AudioError(
                        f"{clip.name}: {sound.format_info} files may be cut off unnoticed; convert it to WAV",
                        "unreadable",
                    )
                yield sound


class _MemoryFile(BytesIO):
    """Keeps its position when a damaged file makes libsndfile seek outside the file.

    An exception could not propagate from libsndfile's callback; it would only be printed.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _open(clip: Clip) -> BinaryIO:
    if clip.encoded is not None:
        file: BinaryIO = BytesIO(clip.encoded)
    elif clip.path is None or not os.path.isfile(clip.path):
        raise AudioError(f"{clip.name}: no such audio file", "missing")
    else:
        try:
            file = clip.path.open("rb")
        except OSError as error:
            raise AudioError(f"{clip.name}: cannot be read: {error.strerror}", "unreadable") from error
    if file.seek(0, os.SEEK_END) == 0:
        file.close()
        raise AudioError(f"{clip.name}: the file is empty", "empty")
    return file


def _decode(sound: soundfile.SoundFile, name: str) -> Tensor:
    try:
        # Some codecs in WAV (GSM 6.10, G.721) cannot seek, and are read by a stated number of samples.
        samples = sound.read(-1 if sound.seekable() else sound.frames, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name}: damaged or cut off after its header: {_said(error)}", "truncated"
        ) from error
    except (MemoryError, ValueError) as error:  # an impossible length requests too much memory
        raise AudioError(
            f"{name}: its header states {sound.frames} samples: {error}", "unreadable"
        ) from error
    if len(samples) < (1 - LENGTH_TOLERANCE) * sound.frames:
        raise AudioError(f"{name}: cut off, {len(samples)} of {sound.frames} samples are there", "truncated")
    return torch.from_numpy(samples.T.copy())


def _read_with_ffmpeg(clip: Clip, cause: Exception) -> tuple[Tensor, int]:
    """Read formats that libsndfile does not support (M4A, AAC, WMA, ...): (channels, samples), and rate."""
    import audioread
    from audioread.rawread import RawAudioFile  # reads files that libsndfile refuses

    backends = [backend for backend in audioread.available_backends() if backend is not RawAudioFile]
    if clip.path is None:
        with tempfile.NamedTemporaryFile() as file:
            file.write(clip.encoded or b"")
            file.flush()
            return _read_with_ffmpeg(Clip(clip.name, path=Path(file.name)), cause)
    try:
        stream = audioread.audio_open(clip.path, backends)
    except (audioread.DecodeError, EOFError, OSError) as error:
        hint = "" if shutil.which("ffmpeg") else "; if it is M4A, AAC or similar, install ffmpeg"
        raise AudioError(
            f"{clip.name}: not a readable audio file: {_said(cause)}{hint}", "unreadable"
        ) from error
    with stream:
        try:
            pcm = np.frombuffer(b"".join(stream), dtype="<i2").reshape(-1, stream.channels)
        except (audioread.DecodeError, EOFError, ValueError) as error:
            raise AudioError(f"{clip.name}: cannot be decoded: {error}", "unreadable") from error
        waveform, rate = torch.from_numpy(pcm.T.astype(np.float32) / 32768), stream.samplerate
        seconds = waveform.shape[1] / rate
        if seconds < (1 - LENGTH_TOLERANCE) * stream.duration - _FFMPEG_ROUNDING and _is_mp4(clip.path):
            raise AudioError(
                f"{clip.name}: cut off, {seconds:.1f} of {stream.duration:.1f} s are there", "truncated"
            )
        return waveform, rate


def _said(error: Exception) -> str:
    """libsndfile's message, without the object that it names."""
    return str(error.error_string) if isinstance(error, soundfile.LibsndfileError) else one_line(error)


def _is_mp4(path: Path) -> bool:
    """Whether the header lists every packet, which makes its length reliable."""
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"
