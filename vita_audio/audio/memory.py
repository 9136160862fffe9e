"""Clips in memory, as other libraries give them: arrays of any layout, mappings, bytes, decoders.

What is unambiguous is used; everything else is refused in one line, because a wrong guess here (channels
taken for samples, integers for floats) would train a model on noise in silence.
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

from vita_audio.audio.base import AudioError, AudioLike

MOST_CHANNELS = 32
"""With more columns than this, a 2-D waveform is not (samples, channels)."""

_RATES = (1000, 1_000_000)  # Hz; what lies outside is a mistake, and would ask for absurd memory
_LOUDEST = 100.0  # 40 dB over full scale; floats beyond are integers that nobody scaled
# Types whose range says their scale: (zero level, full scale). Wider integers usually hold narrower samples.
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
    """What an :data:`AudioLike` turned out to be: one of a path, an encoded file, or samples.

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
    """Say what a clip is, and bring samples into one form.

    Raises:
        AudioError: it is none of the forms of :data:`AudioLike`, or ambiguous.
    """
    if isinstance(audio, str | PathLike):
        name = os.fsdecode(audio)
        return Clip(name, path=Path(name))
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
        if _is_number(first) and not _is_number(second):  # as Gradio and SciPy order them
            first, second = second, first
        return _samples(first, second)
    hint = " without its sample rate" if isinstance(audio, Tensor | np.ndarray) else ""
    raise AudioError(f"in-memory audio: expected {_FORMS}, got {type(audio).__name__}{hint}", "shape")


def to_waveform(samples: Any, name: str = "in-memory audio") -> Tensor:
    """Samples of any library as (channels, samples), float32, on the CPU; see :data:`AudioLike`.

    Raises:
        AudioError: the type has no certain scale, or the shape no certain meaning.
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
        raise AudioError(f"{name}: a sample rate of {rate} Hz; known are {lowest} to {highest} Hz", "rate")
    return rate


def check_range(waveform: Tensor, name: str) -> None:
    """Refuse samples that are not finite, or so loud that they were never scaled to [-1, 1].

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


def _identify_mapping(audio: Mapping[str, Any]) -> Clip:
    """``datasets``' and transformers' dictionaries."""
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
    """Read from the current position; put it back there, so that the object can be read again."""
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
    """A real number, or an array or tensor of no dimensions that holds one."""
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
    """float32, scaled, same shape, on the CPU; memory of its own where the layout is not PyTorch's."""
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
            f"{name}: {kind} samples have no certain scale; give floats in [-1, 1], int16 or int32", "dtype"
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
        # PyTorch takes neither negative strides nor foreign byte orders.
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"{name}: not an array of numbers: {one_line(error)}", "dtype") from error


def _to_channels(waveform: Tensor, name: str) -> Tensor:
    """(channels, samples) of either order."""
    if waveform.dim() == 1:
        return waveform[None]
    if waveform.dim() == 2:
        rows, columns = waveform.shape
        if waveform.numel() == 0:
            return waveform.reshape(1, 0)
        if rows <= columns and rows <= MOST_CHANNELS:
            return waveform
        if rows > MOST_CHANNELS >= columns:  # as soundfile and SciPy order them
            return waveform.T.contiguous()
    raise AudioError(
        f"{name}: expected (samples,), (channels, samples) or (samples, channels) "
        f"with at most {MOST_CHANNELS} channels, got {tuple(waveform.shape)}",
        "shape",
    )
