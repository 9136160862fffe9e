"""Band-limited resampling of whole clips or of streams.

It is part of the codecs' numeric contract: tokens and features are defined on its output (windowed sinc,
width 6, roll-off 0.99, Hann; section 1.1 of the GLM-4-Voice specification and section 2.1 of the SenseVoice
one). Each output is a weighted sum of the ``2 * width + 1`` inputs around it, so a stream yields exactly
the samples of the whole clip.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vita_audio.audio.base import AudioError

_LOWPASS_WIDTH = 6
_ROLLOFF = 0.99
_OUTPUTS_PER_SLICE = 1 << 18  # bounds memory use for long recordings


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited resampling along the last dimension (GLM-4-Voice specification, section 1.1).

    The weights of an output depend only on its phase, of which there are ``to_rate / gcd``.

    Args:
        waveform: shape (..., samples), float.
        from_rate: rate of the input in Hz.
        to_rate: rate of the output in Hz.

    Returns:
        Shape (..., ceil(samples * to_rate / from_rate)), same type and device.

    Raises:
        AudioError: a rate is not positive.
    """
    old, new = _ratio(from_rate, to_rate)
    if old == new or waveform.shape[-1] == 0:
        return waveform
    return _outputs(waveform, 0, 0, _total_outputs(waveform.shape[-1], old, new), old, new)


class StreamResampler:
    """:func:`resample` for a clip that arrives in pieces; the samples do not depend on the split.

    Args:
        from_rate: rate of the pieces in Hz.
        to_rate: rate of the output in Hz.
    """

    def __init__(self, from_rate: int, to_rate: int):
        self._old, self._new = _ratio(from_rate, to_rate)
        self._kept = torch.empty(0)  # inputs needed by further outputs
        self._first = 0  # index of the first of them
        self._emitted = 0

    def push(self, waveform: Tensor, last: bool = False) -> Tensor:
        """Newly final outputs for further inputs of shape (samples,), float32; ``last`` resets the stream."""
        if self._old == self._new:
            return waveform
        self._kept = torch.cat([self._kept, waveform])
        heard = self._first + len(self._kept)
        _, _, width = _sinc_filters(self._old, self._new)
        if last:
            ready = _total_outputs(heard, self._old, self._new)
        else:
            # Output k looks at inputs up to floor(k * old / new) + width.
            ready = max(self._emitted, -(-(heard - width) * self._new // self._old))
        outputs = _outputs(self._kept, self._first, self._emitted, ready, self._old, self._new)
        if last:
            self._kept, self._first, self._emitted = torch.empty(0), 0, 0
            return outputs
        self._emitted = ready
        needed = max(self._first, ready * self._old // self._new - width)
        self._kept = self._kept[needed - self._first :]
        self._first = needed
        return outputs


def _ratio(from_rate: int, to_rate: int) -> tuple[int, int]:
    """The rates divided by their greatest common divisor."""
    if from_rate < 1 or to_rate < 1:
        raise AudioError(f"sample rates must be positive, got {from_rate} and {to_rate} Hz", "rate")
    divisor = math.gcd(from_rate, to_rate)
    return from_rate // divisor, to_rate // divisor


def _total_outputs(samples: int, old: int, new: int) -> int:
    """The reference rounds the exact length to float32 before it takes the ceiling."""
    return math.ceil(np.float32(new * samples / old))


def _outputs(waveform: Tensor, first: int, start: int, stop: int, old: int, new: int) -> Tensor:
    """Outputs ``start`` to ``stop``; the first sample of ``waveform`` is input ``first``, padded with zeros."""
    weights, first_taps, width = _sinc_filters(old, new)
    weights, first_taps = weights.to(waveform), first_taps.to(waveform.device)
    padded = torch.nn.functional.pad(waveform, (width, 2 * (width + old)))
    windows = padded.unfold(-1, 2 * width + 1, 1)
    pieces = [waveform[..., :0]]
    for begin in range(start, stop, _OUTPUTS_PER_SLICE):
        position = torch.arange(begin, min(begin + _OUTPUTS_PER_SLICE, stop), device=waveform.device)
        phase = position % new
        tap = position // new * old + first_taps[phase] + width - first
        pieces.append((windows[..., tap, :] * weights[phase]).sum(-1))
    return torch.cat(pieces, dim=-1)


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
