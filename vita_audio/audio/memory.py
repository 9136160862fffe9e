"""Clips in memory, in the forms of other libraries: arrays of any layout, mappings, bytes, decoders.

Unambiguous input is used; everything else is refused in one line, because a wrong guess here (channels
read as samples, integers as floats) would silently train a model on noise.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vita_audio.audio.archives import is_member, read_file
from vita_audio.audio.base import AudioError, AudioLike

MOST_CHANNELS = 32
"""A 2-D waveform with more columns than this is not (samples, channels)."""

_RATES = (1000, 1_000_000)  # Hz; anything else is a mistake, and would require too much memory
_LOUDEST = 100.0  # 40 dB over full scale; larger floats are unscaled integers
# Types whose range determines their scale: (zero level, full scale). Wider integers usually hold narrower samples.
_INTEGERS = {
    "int8": (0.0, 2.0**7),
    "int16": (0.0, 2.0**15),
    "int32": (0.0, 2.0**31),
    "uint8": (2.0**7, 2.0**7),
    "uint16": (2.0**15, 2.0**15),
}
_FORMS = "a path, bytes, a file object, (waveform, sample_rate) or {'array', 'sampling_rate'}"


@dataclass(frozen=True)
class Clip:
    """A resolved :data:`AudioLike`: a path, an encoded file, or samples.

    Attributes:
        name: for messages.
        path: of an audio file.
        encoded: content of an audio file.
        waveform: shape (channels, samples), float32.
        rate: of ``waveform`` in Hz.
    """

    name: str
    path: Path | None = None
    encoded: bytes | None = None
    waveform: Tensor | None = None
    rate: int = 0


def identify(audio: AudioLike) -> Clip:
    """Determine the form of a clip, and convert samples to one layout.

    Raises:
        AudioError: it has none of the forms of :data:`AudioLike`, or is ambiguous.
    """
    if isinstance(audio, str | PathLike):
        return _identify_path(os.fsdecode(audio))
    if isinstance(audio, bytes | bytearray | memoryview):
        return Clip("audio bytes", encoded=bytes(audio))
    if isinstance(audio, Mapping):
        return _identify_mapping(audio)
    if hasattr(audio, "get_all_samples"):
        decoder: Any = audio
        try:
            samples = decoder.get_all_samples()
        except (RuntimeError, ValueError, OSError) as error:  # torchcodec decodes only now
            raise AudioError(
                f"in-memory audio: cannot be decoded: {one_line(error)}", "unreadable"
            ) from error
        return _samples(samples.data, samples.sample_rate)
    if callable(getattr(audio, "read", None)):
        return _identify_file_object(audio)
    if isinstance(audio, tuple | list) and len(audio) == 2:
        first, second = audio
        if _is_number(first) and not _is_number(second):  # the order of Gradio and SciPy
            first, second = second, first
        return _samples(first, second)
    hint = " without its sample rate" if isinstance(audio, Tensor | np.ndarray) else ""
    raise AudioError(f"in-memory audio: expected {_FORMS}, got {type(audio).__name__}{hint}", "shape")


def to_waveform(samples: Any, name: str = "in-memory audio") -> Tensor:
    """Samples from any library as (channels, samples), float32, on the CPU; see :data:`AudioLike`.

    Raises:
        AudioError: the scale of the type or the meaning of the shape is ambiguous.
    """
    waveform = _to_channels(_to_float(samples, name), name)
    check_range(waveform, name)
    return waveform


def to_piece(samples: Any) -> Tensor:
    """The next samples of a stream, (samples,), float32; may be empty.

    Raises:
        AudioError: as :func:`to_waveform`, or the samples are not one channel or not finite.
    """
    piece = _to_float(samples, "streamed audio")
    if piece.dim() != 1:
        raise AudioError(f"streamed audio: expected (samples,), got {tuple(piece.shape)}", "shape")
    check_range(piece, "streamed audio")
    return piece


def check_rate(rate: int, name: str) -> int:
    """The sample rate, if a recording can have it.

    Raises:
        AudioError: reason ``"rate"``.
    """
    if not isinstance(rate, int | np.integer) or rate < 1:
        raise AudioError(f"{name}: sample rate must be a positive number of Hz, got {rate}", "rate")
    lowest, highest = _RATES
    if not lowest <= rate <= highest:
        raise AudioError(f"{name}: a sample rate of {rate} Hz is outside {lowest} to {highest} Hz", "rate")
    return rate


def check_range(waveform: Tensor, name: str) -> None:
    """Refuse samples that are not finite, or that were evidently not scaled to [-1, 1].

    Raises:
        AudioError: reason ``"nan"`` or ``"range"``.
    """
    if waveform.numel() == 0:
        return
    peak = float(waveform.abs().max())  # NaN if any sample is
    if not np.isfinite(peak):
        raise AudioError(f"{name}: holds samples that are not finite numbers", "nan")
    if peak > _LOUDEST or (peak >= 2 and bool((waveform == waveform.round()).all())):
        raise AudioError(
            f"{name}: samples reach {peak:g}; floats must be in [-1, 1], so scale them first "
            "(int16 values: divide by 32768)",
            "range",
        )


def _identify_path(name: str) -> Clip:
    if not is_member(name):
        return Clip(name, path=Path(name))
    try:
        return Clip(name, encoded=read_file(name))
    except FileNotFoundError as error:
        raise AudioError(f"{name}: {error.strerror}", "missing") from error
    except OSError as error:
        raise AudioError(f"{name}: cannot be read: {error.strerror}", "unreadable") from error


def _identify_mapping(audio: Mapping[str, Any]) -> Clip:
    """Read dictionaries of ``datasets`` and transformers."""
    for key in ("array", "raw"):
        if audio.get(key) is not None:
            if audio.get("sampling_rate") is None:
                raise AudioError(f"in-memory audio: {key!r} without 'sampling_rate'", "rate")
            return _samples(audio[key], audio["sampling_rate"])
    path, encoded = audio.get("path"), audio.get("bytes")
    if encoded is not None:
        try:
            content = bytes(memoryview(encoded))
        except TypeError as error:
            raise AudioError(
                f"in-memory audio: 'bytes' must be bytes, it is {type(encoded).__name__}", "dtype"
            ) from error
        return Clip(str(path or "audio bytes"), encoded=content)
    if path is not None:
        return identify(path)
    raise AudioError(
        "in-memory audio: a mapping needs 'array' and 'sampling_rate', or 'path' or 'bytes'; "
        f"got {sorted(map(str, audio))}",
        "shape",
    )


def _identify_file_object(audio: Any) -> Clip:
    """Read from the current position and restore it afterwards, so the object can be read again."""
    name = getattr(audio, "name", None)
    name = name if isinstance(name, str) else "audio file object"
    try:
        position = audio.tell() if audio.seekable() else None
        encoded = audio.read()
        if position is not None:
            audio.seek(position)
    except (AttributeError, OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be read: {error}", "unreadable") from error
    if not isinstance(encoded, bytes):
        raise AudioError(f"{name}: opened as text; open it in binary mode", "unreadable")
    if not encoded and position:
        raise AudioError(f"{name}: nothing follows position {position}; call seek(0) first", "empty")
    return Clip(name, encoded=encoded)


def _samples(samples: Any, rate: Any) -> Clip:
    name = "in-memory audio"
    if _is_number(samples) or not _is_number(rate):
        raise AudioError(
            f"{name}: expected (waveform, sample_rate), got {type(samples).__name__} and {type(rate).__name__}",
            "shape",
        )
    if not float(rate).is_integer():
        raise AudioError(f"{name}: sample rate must be a positive number of Hz, got {rate}", "rate")
    return Clip(name, waveform=to_waveform(samples, name), rate=check_rate(int(rate), name))


def one_line(error: Exception) -> str:
    """What an exception of another library says, on one line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _is_number(value: Any) -> bool:
    """Whether this is a real number, or a zero-dimensional array or tensor that holds one."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        return False
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return False
    try:
        operator.index(value)
    except TypeError:
        return isinstance(value, float | np.floating)
    return True


def _to_float(samples: Any, name: str) -> Tensor:
    """float32, scaled, same shape, on the CPU; copied if PyTorch does not support the layout."""
    if not isinstance(samples, Tensor):
        samples = _to_tensor(samples, name)
    if samples.is_nested or samples.layout != torch.strided or samples.is_meta:
        raise AudioError(
            f"{name}: give a dense tensor with its data, not a nested, sparse or meta one", "dtype"
        )
    samples = samples.detach().cpu()
    if samples.is_floating_point():
        return samples.float()
    kind = str(samples.dtype).removeprefix("torch.")
    if kind not in _INTEGERS:
        raise AudioError(
            f"{name}: the scale of {kind} samples is ambiguous; give floats in [-1, 1], int16 or int32",
            "dtype",
        )
    if kind == "int32" and samples.numel() and 0 < int(samples.abs().max()) <= 2**15:
        raise AudioError(f"{name}: int32 samples in the range of int16; convert them to int16", "range")
    if (
        kind == "int32"
        and samples.numel()
        and 0 < int(samples.abs().max()) <= 2**23
        and bool((samples % 256).any())
    ):
        raise AudioError(f"{name}: int32 samples in the range of 24 bits; multiply them by 256", "range")
    zero, scale = _INTEGERS[kind]
    return ((samples.double() - zero) / scale).float()


def _to_tensor(samples: Any, name: str) -> Tensor:
    try:
        if isinstance(samples, np.ma.MaskedArray) and np.ma.is_masked(samples):
            raise ValueError("some samples are masked")
        array = np.asarray(samples)
        if array.dtype == np.longdouble:
            array = array.astype(np.float64)
        # PyTorch supports neither negative strides nor foreign byte orders.
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{name}: not an array of numbers: {one_line(error)}", "dtype") from error


def _to_channels(waveform: Tensor, name: str) -> Tensor:
    """(channels, samples) from either order."""
    if waveform.dim() == 1:
        return waveform[None]
    if waveform.dim() == 2:
        rows, columns = waveform.shape
        if waveform.numel() == 0:
            return waveform.reshape(1, 0)
        if rows <= columns and rows <= MOST_CHANNELS:
            return waveform
        if rows > MOST_CHANNELS >= columns:  # the order of soundfile and SciPy
            return waveform.T.contiguous()
    raise AudioError(
        f"{name}: expected (samples,), (channels, samples) or (samples, channels) "
        f"with at most {MOST_CHANNELS} channels, got {tuple(waveform.shape)}",
        "shape",
    )
