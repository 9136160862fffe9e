"""Mel to waveform: a HiFT generator (section 6 of the GLM-4-Voice specification).

Pitch is predicted from the mel, harmonics are synthesised at that pitch, and a convolutional trunk shapes
their spectrum into that of speech; a small inverse STFT turns the spectrum into samples. The random parts, the
harmonics' phases and the breath noise, can be passed in. The start of the source can be overwritten with the
end of the previous chunk's source, which keeps a stream continuous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vita_audio.audio.glm4voice.config import F0PredictorConfig, VocoderConfig, load_decoder_config
from vita_audio.audio.glm4voice.flow import DEFAULT_SEED, draw_normal
from vita_audio.audio.glm4voice.weights import find_weights, load_strictly, read_state_dict

_SINE_AMPLITUDE_OVER_NOISE = 3.0  # unvoiced noise is a third of the sine amplitude
_MAX_MAGNITUDE = 100.0
_SNAKE_EPSILON = 1e-9


class Vocoder(nn.Module):
    """80-bin mel to a waveform at 22050 Hz, 256 samples per frame."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        self.config = config
        self.samples_per_frame = math.prod(config.upsample_rates) * config.hop_len
        spectrum = config.n_fft + 2  # real and imaginary parts
        self.m_source = nn.ModuleDict({"l_linear": nn.Linear(config.nb_harmonics + 1, 1)})
        self.conv_pre = WeightNormConv1d(config.in_channels, config.base_channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.source_downs = nn.ModuleList()
        self.source_resblocks = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        width = config.base_channels
        sources = zip(config.source_resblock_kernel_sizes, config.source_resblock_dilation_sizes, strict=True)
        upsampling = zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True)
        for stage, (rate, kernel) in enumerate(upsampling):
            self.ups.append(
                WeightNormConvTranspose1d(
                    width, width // 2, kernel, stride=rate, padding=(kernel - rate) // 2
                )
            )
            width //= 2
            # The source's spectrum has the last stage's rate.
            ratio = math.prod(config.upsample_rates[stage + 1 :])
            self.source_downs.append(
                nn.Conv1d(spectrum, width, 1)
                if ratio == 1
                else nn.Conv1d(spectrum, width, 2 * ratio, stride=ratio, padding=ratio // 2)
            )
            self.source_resblocks.append(_ResBlock(width, *next(sources)))
            for kernel_size, dilations in zip(
                config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(_ResBlock(width, kernel_size, dilations))
        self.conv_post = WeightNormConv1d(width, spectrum, 7, padding=3)
        self.f0_predictor = F0Predictor(config.f0_predictor)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str], *, device: str | torch.device = "cpu") -> Vocoder:
        """Load ``hift.safetensors`` or ``hift.pt`` with the folder's configuration; weight norm is folded.

        Raises:
            ConfigError: the configuration is missing or not of this decoder.
            WeightsError: the weights are missing, damaged or of other sizes.
        """
        path = find_weights(folder, "hift")
        with torch.device("meta"):
            vocoder = cls(load_decoder_config(Path(folder)).vocoder)
        load_strictly(vocoder, read_state_dict(path), path)
        return vocoder.fold_weight_norm().to(device)

    def fold_weight_norm(self) -> Vocoder:
        """Replace each gain and direction by the weight they represent."""
        for module in self.modules():
            if isinstance(module, (WeightNormConv1d, WeightNormConvTranspose1d)):
                _fold(module)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(
        self,
        mel: Tensor,
        cached_source: Tensor | None = None,
        *,
        phase: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Waveform of a mel spectrogram.

        Args:
            mel: (rows, 80, frames).
            cached_source: end of the previous chunk's source, (rows, 1, samples); overwrites the start.
            phase: initial phase of each harmonic, (harmonics + 1,) or (rows, harmonics + 1, 1), radians.
            noise: standard normal, (rows, harmonics + 1, 256 * frames).
            generator: draws ``phase`` and ``noise`` if they are None; defaults to one seeded with 42.

        Returns:
            waveform (rows, 256 * frames) in [-0.99, 0.99], and the source (rows, 1, 256 * frames).
        """
        mel = mel.to(self.device)
        source = self.source(self.f0_predictor(mel), phase=phase, noise=noise, generator=generator)
        if cached_source is not None and cached_source.shape[-1]:
            source[:, :, : cached_source.shape[-1]] = cached_source
        return self.decode(mel, source), source

    @torch.no_grad()
    def source(
        self,
        f0: Tensor,
        *,
        phase: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Harmonics and noise at pitch ``f0`` (section 6.2).

        Args:
            f0: (rows, frames) in Hz.
            phase: as in ``forward``.
            noise: as in ``forward``.
            generator: as in ``forward``.

        Returns:
            (rows, 1, 256 * frames) in (-1, 1).
        """
        config = self.config
        rows, harmonics = f0.shape[0], config.nb_harmonics + 1
        samples = f0.shape[1] * self.samples_per_frame
        if phase is None or noise is None:
            drawn_phase, drawn_noise = draw_source(rows, harmonics, samples, generator)
            phase = drawn_phase if phase is None else phase
            noise = drawn_noise if noise is None else noise
        phase = phase.to(f0).reshape(-1, harmonics, 1).clone()
        phase[:, 0] = 0

        pitch = f0[:, None].repeat_interleave(self.samples_per_frame, dim=-1)
        multiples = torch.arange(1, harmonics + 1, device=f0.device, dtype=f0.dtype)[:, None]
        # Summed in float64 and rounded, as PyTorch does on the CPU, so all devices agree.
        cycles = (pitch * multiples / config.sampling_rate).cumsum(dim=-1, dtype=torch.float64).to(f0)
        angle = 2 * math.pi * (cycles % 1)
        voiced = (pitch > config.nsf_voiced_threshold).to(f0)
        breath = voiced * config.nsf_sigma + (1 - voiced) * config.nsf_alpha / _SINE_AMPLITUDE_OVER_NOISE
        waves = config.nsf_alpha * torch.sin(angle + phase) * voiced + breath * noise.to(f0)
        return torch.tanh(self.m_source["l_linear"](waves.transpose(1, 2))).transpose(1, 2)

    @torch.no_grad()
    def decode(self, mel: Tensor, source: Tensor) -> Tensor:
        """Shape a source (rows, 1, 256 * frames) with a mel (rows, 80, frames); waveform (rows, samples)."""
        config = self.config
        spectrum = self._spectrum(source[:, 0])
        kinds = len(config.resblock_kernel_sizes)
        x = self.conv_pre(mel)
        for stage, (up, down, shape_source) in enumerate(
            zip(self.ups, self.source_downs, self.source_resblocks, strict=True)
        ):
            x = up(F.leaky_relu(x, config.lrelu_slope))
            if stage == len(self.ups) - 1:
                x = F.pad(x, (1, 0), mode="reflect")
            x = x + shape_source(down(spectrum))
            x = sum(block(x) for block in self.resblocks[stage * kinds : (stage + 1) * kinds]) / kinds
        # PyTorch's default slope here, unlike above: the released model was trained with it.
        magnitude, phase = self.conv_post(F.leaky_relu(x)).chunk(2, dim=1)
        waveform = self._waveform(magnitude.exp().clamp(max=_MAX_MAGNITUDE), torch.sin(phase))
        return waveform.clamp(-config.audio_limit, config.audio_limit)

    def _spectrum(self, samples: Tensor) -> Tensor:
        """Real and imaginary STFT, (rows, n_fft + 2, samples / hop + 1)."""
        config = self.config
        transformed = torch.stft(
            samples, config.n_fft, config.hop_len, window=self._window(samples), return_complex=True
        )
        return torch.cat([transformed.real, transformed.imag], dim=1)

    def _waveform(self, magnitude: Tensor, phase: Tensor) -> Tensor:
        config = self.config
        return torch.istft(
            torch.polar(magnitude, phase), config.n_fft, config.hop_len, window=self._window(magnitude)
        )

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.config.n_fft, dtype=like.dtype, device=like.device)


class F0Predictor(nn.Module):
    """Pitch in Hz from mel (section 6.1)."""

    def __init__(self, config: F0PredictorConfig):
        super().__init__()
        widths = (config.in_channels, *[config.cond_channels] * 5)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [WeightNormConv1d(inputs, outputs, 3, padding=1), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(config.cond_channels, 1)

    def forward(self, mel: Tensor) -> Tensor:
        """(rows, 80, frames) to (rows, frames)."""
        return self.classifier(self.condnet(mel).transpose(1, 2)).squeeze(-1).abs()


class _ResBlock(nn.Module):
    """Dilated residual convolutions with periodic activations (section 6.5)."""

    def __init__(self, width: int, kernel: int, dilations: Sequence[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            WeightNormConv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
            for dilation in dilations
        )
        self.convs2 = nn.ModuleList(
            WeightNormConv1d(width, width, kernel, padding=(kernel - 1) // 2) for _ in dilations
        )
        self.activations1 = nn.ModuleList(_Snake(width) for _ in dilations)
        self.activations2 = nn.ModuleList(_Snake(width) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for snake1, conv1, snake2, conv2 in layers:
            x = x + conv2(snake2(conv1(snake1(x))))
        return x


class _Snake(nn.Module):
    """x + sin(a x)^2 / a, a frequency per channel."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        return x + torch.sin(alpha * x).square() / (alpha + _SNAKE_EPSILON)


class WeightNormConv1d(nn.Conv1d):
    """A convolution stored as gain ``weight_g`` and direction ``weight_v`` until it is folded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split(self)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _weight(self), self.bias)


class WeightNormConvTranspose1d(nn.ConvTranspose1d):
    """The transposed counterpart; its norm also keeps dimension 0, which here is the input channels."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _split(self)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding: Any = self.padding
        return F.conv_transpose1d(x, _weight(self), self.bias, self.stride, padding)


def _split(conv: Any) -> None:
    direction = conv.weight
    del conv.weight
    conv.weight_g = nn.Parameter(direction.detach().norm(dim=(1, 2), keepdim=True))
    conv.weight_v = direction


def _weight(conv: Any) -> Tensor:
    if hasattr(conv, "weight"):
        return conv.weight
    return conv.weight_g * conv.weight_v / conv.weight_v.norm(dim=(1, 2), keepdim=True)


def _fold(conv: Any) -> None:
    if not hasattr(conv, "weight"):
        weight = _weight(conv).detach()
        del conv.weight_g, conv.weight_v
        conv.weight = nn.Parameter(weight, requires_grad=False)


def draw_source(
    rows: int, harmonics: int, samples: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Random draws of one vocoder call, in the reference's order (section 6).

    Returns:
        phases (rows, harmonics, 1), uniform in [-pi, pi), and noise (rows, harmonics, samples), normal.
    """
    generator = generator or torch.Generator().manual_seed(DEFAULT_SEED)
    uniform = torch.rand((rows, harmonics, 1), generator=generator, device=generator.device)
    return uniform * (2 * math.pi) - math.pi, draw_normal((rows, harmonics, samples), generator)
