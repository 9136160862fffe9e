"""Spectrogram to waveform and back, for codecs without a neural vocoder.

Framing is exact: ``hop * n`` samples give ``n`` frames, and frame ``i`` is centred on the middle of its hop.

:class:`GriffinLim` finds phases for magnitudes block by block. Solved frames are fixed and contribute to the
overlap-add of the next block. A sample therefore depends on the frames before it and a short look-ahead, not on how
the input is split: streamed speech equals offline speech, the work is linear, and there are no seams to cross-fade.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def stft(waveform: Tensor, fft_size: int, hop: int) -> Tensor:
    """Complex spectrogram.

    Args:
        waveform: shape (hop * frames,).

    Returns:
        Shape (frames, fft_size // 2 + 1).
    """
    edge = fft_size - hop
    padded = torch.nn.functional.pad(waveform, (edge // 2, edge - edge // 2))
    return torch.fft.rfft(padded.unfold(0, fft_size, hop) * hann_window(fft_size))


@lru_cache(maxsize=4)
def hann_window(fft_size: int) -> Tensor:
    """Periodic Hann window, shape (fft_size,)."""
    return torch.hann_window(fft_size)


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, fft_size: int, mels: int) -> Tensor:
    """Slaney mel filters, shape (fft_size // 2 + 1, mels)."""
    import librosa  # heavy, and only this codec needs it

    filters = librosa.filters.mel(sr=sample_rate, n_fft=fft_size, n_mels=mels)
    return torch.from_numpy(filters.T.copy()).float()


class GriffinLim:
    """Phases for magnitudes that arrive in pieces (fast Griffin-Lim, Perraudin et al. 2013).

    Args:
        fft_size: samples in a window; a multiple of ``hop``.
        hop: samples between windows.
        block: frames solved together.
        lookahead: further frames used to solve a block; they are solved again with the next one.
        iterations: iterations per block.
        momentum: 0 gives the classic algorithm.

    Raises:
        ValueError: ``fft_size`` is not a multiple of ``hop``.
    """

    def __init__(
        self,
        fft_size: int,
        hop: int,
        block: int,
        lookahead: int,
        iterations: int = 32,
        momentum: float = 0.99,
    ):
        if fft_size % hop:
            raise ValueError(f"fft_size {fft_size} must be a multiple of hop {hop}")
        self.fft_size, self.hop = fft_size, hop
        self.block, self.lookahead = block, lookahead
        self.iterations = iterations
        self._extrapolation = momentum / (1 + momentum)
        self._window = hann_window(fft_size)
        self._pending = torch.zeros(0, fft_size // 2 + 1)
        self._solved = 0  # frames
        # Overlap-add of solved frames, and of their squared windows, at samples that later frames also reach.
        self._overlap = torch.zeros(fft_size - hop)
        self._weight = torch.zeros(fft_size - hop)
        self._lead = (fft_size - hop) // 2  # samples of the first window before time 0

    def push(self, magnitudes: Tensor, last: bool = False) -> Tensor:
        """Add magnitudes of shape (frames, fft_size // 2 + 1); return the samples that are now final.

        After ``last``, ``hop`` samples have been returned for every frame pushed.
        """
        self._pending = torch.cat([self._pending, magnitudes])
        pieces = []
        while len(self._pending) >= self.block + self.lookahead:
            pieces.append(self._solve(self.block))
        if last and len(self._pending):
            pieces.append(self._solve(len(self._pending)))
        if last and self._solved:
            remaining = self.fft_size - self.hop - (self.fft_size - self.hop) // 2
            pieces.append((self._overlap / self._weight.clamp(min=1e-3))[:remaining])
        return torch.cat(pieces) if pieces else torch.zeros(0)

    @property
    def missing(self) -> int:
        """Frames that the next block waits for."""
        return self.block + self.lookahead - len(self._pending)

    def _solve(self, frames: int) -> Tensor:
        """Fix the phases of the next frames; return the samples that no later frame reaches."""
        magnitudes = self._pending[: frames + self.lookahead]
        weight = self._overlap_add(self._weight, self._window.square().expand(len(magnitudes), -1))
        weight = weight.clamp(min=1e-3)
        phases = self._initial_phases(len(magnitudes))
        previous = torch.zeros_like(phases)
        for _ in range(self.iterations):
            signal = self._overlap_add(self._overlap, self._synthesise(magnitudes * phases)) / weight
            rebuilt = torch.fft.rfft(signal.unfold(0, self.fft_size, self.hop) * self._window)
            phases = rebuilt - self._extrapolation * previous
            phases = phases / phases.abs().clamp(min=1e-12)
            previous = rebuilt
        solved = self._synthesise(magnitudes[:frames] * phases[:frames])
        overlap = self._overlap_add(self._overlap, solved)
        weight = self._overlap_add(self._weight, self._window.square().expand(frames, -1))
        final = frames * self.hop
        self._overlap, self._weight = overlap[final:], weight[final:]
        self._pending = self._pending[frames:]
        self._solved += frames
        lead, self._lead = self._lead, 0
        return (overlap[:final] / weight[:final].clamp(min=1e-3))[lead:]

    def _synthesise(self, spectra: Tensor) -> Tensor:
        return torch.fft.irfft(spectra, n=self.fft_size) * self._window

    def _overlap_add(self, start: Tensor, windows: Tensor) -> Tensor:
        """Overlap-add of windows, starting from that of earlier ones, shape ((frames - 1) * hop + fft_size,)."""
        frames, parts = len(windows), self.fft_size // self.hop
        total = torch.zeros(frames + parts - 1, self.hop)
        total[: parts - 1] += start.view(-1, self.hop)
        for part in range(parts):
            total[part : part + frames] += windows[:, part * self.hop : (part + 1) * self.hop]
        return total.flatten()

    def _initial_phases(self, frames: int) -> Tensor:
        """Random phases, seeded with the index of the first frame, so results do not depend on earlier calls."""
        bins = self.fft_size // 2 + 1
        generator = torch.Generator().manual_seed(self._solved)
        angles = torch.rand(frames, bins, generator=generator) * 2 * math.pi
        return torch.polar(torch.ones_like(angles), angles)
