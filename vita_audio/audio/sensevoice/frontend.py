"""Speech to 560-dimensional frames, the input of the SenseVoice encoder.

Kaldi filter banks every 10 ms, seven neighbours stacked into one frame every 60 ms, then
the per-feature shift and scale of the released ``am.mvn`` file. This is fixed
arithmetic without weights, so it runs in the data loader's workers and the model receives
frames, not samples.

Definition and numbers: tests/goldens/sensevoice/SPEC.md, section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import pairwise
from os import PathLike
from pathlib import Path

import kaldi_native_fbank as knf
import numpy as np
import torch

from vita_audio.audio.base import AudioLike, FeatureStream
from vita_audio.audio.io import load_audio
from vita_audio.audio.memory import to_piece
from vita_audio.audio.resampling import StreamResampler

SAMPLE_RATE = 16_000
NUM_MELS = 80
STACKED_FRAMES = 7
FRAME_STRIDE = 6
FEATURE_DIM = NUM_MELS * STACKED_FRAMES
STACKED_FRAME_SECONDS = 0.06

_WINDOW_MS = 25.0
_SHIFT_MS = 10.0
_WINDOW_SAMPLES, _SHIFT_SAMPLES = 400, 160
_INT16_SCALE = 32_768.0
# The filters need a 512-point transform (below it some hold no frequency bin), which Kaldi
# chooses for windows of 257 samples and more. Shorter clips, under 16.1 ms, are padded with silence.
_MIN_SAMPLES = 257
_LEAST_DEVIATION = 1e-3  # of a log energy; keeps a constant band from being scaled up


class Frontend:
    """SenseVoice's feature extractor.

    Args:
        path: ``am.mvn`` itself or the folder that holds it.
        dither: standard deviation, on the int16 scale, of the noise added to every window.
            The public front end adds 1.0 in both training and inference; the default here is
            none, so equal speech has equal features.

    Raises:
        FileNotFoundError: there is no ``am.mvn``.
        ValueError: the file is not a normalisation of 560 features.
    """

    sample_rate = SAMPLE_RATE
    feature_dim = FEATURE_DIM

    def __init__(self, path: str | PathLike[str], dither: float = 0.0) -> None:
        self.path = _find_cmvn_file(Path(path))
        self.dither = dither
        self.shift, self.scale = read_cmvn(self.path)

    @property
    def fingerprint(self) -> str:
        """A short stable name of the normalisation; the key of feature caches."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]

    def stream(self, sample_rate: int = SAMPLE_RATE) -> FrontendStream:
        """A fresh feature stream for one clip, whose pieces have this rate in Hz."""
        return FrontendStream(self, sample_rate)

    def __call__(self, audio: AudioLike | torch.Tensor | np.ndarray) -> torch.Tensor:
        """Features of one clip.

        Args:
            audio: a clip in any form of :data:`~vita_audio.audio.AudioLike`, or a bare waveform at 16 kHz.

        Returns:
            float32 of shape (ceil(windows / 6), 560), one frame per 60 ms.

        Raises:
            AudioError: the audio cannot be read or holds no samples.
        """
        if isinstance(audio, torch.Tensor | np.ndarray):
            audio = (torch.as_tensor(audio), SAMPLE_RATE)
        waveform, _ = load_audio(audio, SAMPLE_RATE, channels="mean")
        return self.normalize(stack_frames(filter_bank(waveform, self.dither)))

    def normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """Shift and scale stacked frames (frames, 560)."""
        return (frames + self.shift) * self.scale


class FrontendStream(FeatureStream):
    """Features of speech that is still being recorded, equal to those of the whole clip.

    A frame of 60 ms is returned once the windows that it stacks are complete, 55 ms after its start. With
    dither the noise differs from the whole clip's; without it the features are equal.

    Args:
        frontend: the extractor.
        sample_rate: of the pieces in Hz.
    """

    _heard: torch.Tensor

    def __init__(self, frontend: Frontend, sample_rate: int = SAMPLE_RATE) -> None:
        self._frontend = frontend
        self._resampler = StreamResampler(sample_rate, SAMPLE_RATE)
        self._start()

    def push(self, waveform: torch.Tensor | np.ndarray, last: bool = False) -> torch.Tensor:
        """See :meth:`FeatureStream.push`."""
        self._heard = torch.cat([self._heard, self._resampler.push(to_piece(waveform), last)])
        ready = (len(self._heard) - _WINDOW_SAMPLES) // _SHIFT_SAMPLES + 1
        # The first and last windows are repeated only at the ends of a clip.
        if last and self._windows is None and len(self._heard):
            stacked = stack_frames(filter_bank(self._heard, self._frontend.dither))
        else:
            stacked = self._stack(max(0, ready), last)
        if last:
            self._start()
        return self._frontend.normalize(stacked)

    def _start(self) -> None:
        self._heard = torch.empty(0)  # samples from the start of the first window not yet computed
        self._windows: torch.Tensor | None = None  # needed by further frames, (windows, 80)
        self._first = 0  # index of the first of them
        self._frames = 0  # already returned

    def _stack(self, ready: int, last: bool) -> torch.Tensor:
        """Compute the next ``ready`` windows and the frames that they complete."""
        if ready:
            used = (ready - 1) * _SHIFT_SAMPLES + _WINDOW_SAMPLES
            fresh = filter_bank(self._heard[:used], self._frontend.dither)
            self._heard = self._heard[ready * _SHIFT_SAMPLES :]
            self._windows = fresh if self._windows is None else torch.cat([self._windows, fresh])
        if self._windows is None:
            return torch.empty(0, FEATURE_DIM)
        known = self._first + len(self._windows)
        reach = STACKED_FRAMES // 2
        complete = -(-known // FRAME_STRIDE) if last else max(0, (known - 1 - reach) // FRAME_STRIDE + 1)
        centres = torch.arange(self._frames, max(self._frames, complete)) * FRAME_STRIDE
        around = torch.arange(STACKED_FRAMES) - reach
        index = (centres[:, None] + around).clamp(0, known - 1) - self._first
        stacked = self._windows[index].flatten(1)
        self._frames = max(self._frames, complete)
        needed = max(self._first, self._frames * FRAME_STRIDE - reach)
        self._windows = self._windows[needed - self._first :]
        self._first = needed
        return stacked


def filter_bank(waveform: torch.Tensor, dither: float = 0.0) -> torch.Tensor:
    """Log energies of 80 mel bands in windows of 25 ms, every 10 ms (SPEC 2.2).

    Args:
        waveform: (samples,) at 16 kHz in [-1, 1]. A clip shorter than one window is one window.
        dither: see :class:`Frontend`.

    Returns:
        float32 of shape (windows, 80).
    """
    samples = waveform.detach().cpu().float().numpy() * _INT16_SCALE
    samples = np.pad(samples, (0, max(0, _MIN_SAMPLES - len(samples))))
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.frame_opts.frame_length_ms = min(_WINDOW_MS, 1000 * len(samples) / SAMPLE_RATE)
    options.frame_opts.frame_shift_ms = _SHIFT_MS
    options.frame_opts.window_type = "hamming"
    options.frame_opts.dither = dither
    options.mel_opts.num_bins = NUM_MELS
    bank = knf.OnlineFbank(options)
    bank.accept_waveform(SAMPLE_RATE, samples)
    bank.input_finished()
    return torch.from_numpy(np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)]))


def stack_frames(frames: torch.Tensor) -> torch.Tensor:
    """Low frame rate: (windows, 80) to (ceil(windows / 6), 560) (SPEC 2.3).

    Stacked frame ``t`` holds source frames ``6t - 3 … 6t + 3``; beyond the ends, the first
    and last frames are repeated.
    """
    count = -(-len(frames) // FRAME_STRIDE)
    centres = torch.arange(count)[:, None] * FRAME_STRIDE
    around = torch.arange(STACKED_FRAMES)[None] - STACKED_FRAMES // 2
    return frames[(centres + around).clamp(0, len(frames) - 1)].flatten(1)


def read_cmvn(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift (the negative mean) and scale from a file in Kaldi's text format, (560,) each (SPEC 2.4).

    Raises:
        ValueError: a part is missing or does not hold 560 numbers.
    """
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]

    def values_after(tag: str) -> torch.Tensor:
        for header, values in pairwise(lines):
            # <LearnRateCoef> 0 [ v1 … v560 ]
            if header[0] == tag and values[0] == "<LearnRateCoef>":
                numbers = values[3:-1]
                if len(numbers) != FEATURE_DIM:
                    raise ValueError(f"{path}: {tag} holds {len(numbers)} values, expected {FEATURE_DIM}")
                try:
                    return torch.tensor([float(number) for number in numbers])
                except ValueError as error:
                    raise ValueError(f"{path}: {tag} holds a value that is not a number: {error}") from None
        raise ValueError(f"{path}: no {tag} section; expected SenseVoice's am.mvn")

    return values_after("<AddShift>"), values_after("<Rescale>")


def estimate_cmvn(audios: Iterable[AudioLike]) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale that give the features of these clips mean 0 and variance 1, (560,) each.

    For encoders trained from scratch; the released weights need the released file.

    Raises:
        AudioError: a clip cannot be read.
        ValueError: there are no clips.
    """
    count, total, squares = 0, torch.zeros(FEATURE_DIM).double(), torch.zeros(FEATURE_DIM).double()
    for audio in audios:
        waveform, _ = load_audio(audio, SAMPLE_RATE, channels="mean")
        frames = stack_frames(filter_bank(waveform)).double()
        count += len(frames)
        total += frames.sum(dim=0)
        squares += frames.square().sum(dim=0)
    if count == 0:
        raise ValueError("no audio to estimate the normalisation from")
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return -mean.float(), 1 / deviation.clamp(min=_LEAST_DEVIATION).float()


def write_cmvn(path: Path, shift: torch.Tensor, scale: torch.Tensor) -> None:
    """Write a normalisation file that :func:`read_cmvn` reads."""

    def section(tag: str, values: torch.Tensor) -> str:
        numbers = " ".join(f"{value:.6f}" for value in values.tolist())
        return f"<{tag}> {FEATURE_DIM} {FEATURE_DIM}\n<LearnRateCoef> 0 [ {numbers} ]\n"

    path.write_text(
        f"<Nnet>\n<Splice> {FEATURE_DIM} {FEATURE_DIM}\n[ 0 ]\n"
        + section("AddShift", shift)
        + section("Rescale", scale)
        + "</Nnet>\n"
    )


def _find_cmvn_file(path: Path) -> Path:
    file = path / "am.mvn" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; the SenseVoice front end needs the folder with am.mvn")
    return file
