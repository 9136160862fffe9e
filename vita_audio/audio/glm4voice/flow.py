"""Codes to mel by conditional flow matching (sections 4 and 5 of the GLM-4-Voice specification).

Codes are encoded and stretched to mel rate (``mu``). Then a few Euler steps transport noise to a mel spectrogram
along the velocity that the estimator predicts, with classifier-free guidance. With a prompt, that is, codes and
their known mel, the new mel continues the earlier speech.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vita_audio.audio.glm4voice.config import FlowConfig, LengthRegulatorConfig, load_decoder_config
from vita_audio.audio.glm4voice.estimator import Estimator, MaskedGroupNorm
from vita_audio.audio.glm4voice.token_encoder import TokenEncoder
from vita_audio.audio.glm4voice.weights import find_weights, load_strictly, read_state_dict

DEFAULT_SEED = 42
"""The reference's seed before each call; the default seed of every generator here."""

ROWS_PER_PASS = 4
"""Rows of a pass that several replies share. Twice as many would make a new reply wait longer (docs/log.md)."""

FRAMES_PER_BUCKET = 128
"""Their mel frames are padded to a multiple of this many."""


@dataclass
class FlowInput:
    """One row of a batch.

    Attributes:
        tokens: codes, prompt first, (codes,), long.
        sources: index of the code that each mel frame repeats, (frames,), long.
        noise: the solver's initial value, (80, frames).
        prompt_mel: known first frames, (80, known).
        speaker: embedding (spk_embed_dim,); None for zeros.
    """

    tokens: Tensor
    sources: Tensor
    noise: Tensor
    prompt_mel: Tensor
    speaker: Tensor | None = None

    @property
    def frames(self) -> int:
        """Number of mel frames, including the prompt."""
        return len(self.sources)


class FlowDecoder(nn.Module):
    """Codes to an 80-bin mel spectrogram at 22050 / 256 frames per second."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.input_embedding = nn.Embedding(config.vocab_size, config.input_size)
        self.spk_embed_affine_layer = nn.Linear(config.spk_embed_dim, config.output_size)
        self.encoder = TokenEncoder(config.encoder)
        self.encoder_proj = nn.Linear(config.encoder.output_size, config.output_size)
        self.decoder = nn.ModuleDict({"estimator": Estimator(config.estimator)})
        self.length_regulator = LengthRegulator(config.length_regulator, config.output_size)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | PathLike[str], *, device: str | torch.device = "cpu"
    ) -> FlowDecoder:
        """Load ``flow.safetensors`` or ``flow.pt`` with the folder's configuration.

        Raises:
            ConfigError: the configuration is missing or not of this decoder.
            WeightsError: the weights are missing, damaged or of other sizes.
        """
        path = find_weights(folder, "flow")
        with torch.device("meta"):
            flow = cls(load_decoder_config(Path(folder)).flow)
        load_strictly(flow, read_state_dict(path), path)
        return flow.to(device)

    @property
    def device(self) -> torch.device:
        return self.encoder_proj.weight.device

    @property
    def shares_passes(self) -> bool:
        """Whether :meth:`generate` solves several rows in one pass."""
        return self.device.type != "cpu"

    @property
    def estimator(self) -> Estimator:
        """The velocity network."""
        estimator = self.decoder["estimator"]
        assert isinstance(estimator, Estimator)
        return estimator

    def frames(self, tokens: int) -> int:
        """Number of mel frames for a number of codes, in the reference's float32 order of operations (section 4.5)."""
        config = self.config
        seconds = np.float32(tokens) / np.float32(config.input_frame_rate)
        return int(seconds * np.float32(config.mel_sampling_rate) / np.float32(config.mel_hop_size))

    def _most_codes(self, frames: int) -> int:
        """Codes of a row that has this many mel frames, at most; the start of its window is rounded down by frames."""
        config = self.config
        frames_per_code = config.mel_sampling_rate / config.mel_hop_size / config.input_frame_rate
        return math.ceil((frames + 1) / frames_per_code)

    @torch.no_grad()
    def forward(
        self,
        token: Tensor,
        prompt_token: Tensor | None = None,
        prompt_feat: Tensor | None = None,
        embedding: Tensor | None = None,
        *,
        steps: int = 10,
        z: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mel of new codes, in one pass.

        Args:
            token: codes (rows, codes) or (codes,).
            prompt_token: earlier codes, (rows, prompt codes).
            prompt_feat: their mel, time-major, (rows, prompt frames, 80).
            embedding: speaker, (rows, spk_embed_dim); None for zeros, as in the applications.
            steps: Euler steps.
            z: standard normal noise for prompt and new frames, (rows, 80, frames).
            generator: draws ``z`` if ``z`` is None; defaults to one seeded with 42.

        Returns:
            (rows, 80, frames - prompt frames).
        """
        token = torch.atleast_2d(token)
        rows = token.shape[0]
        if prompt_token is not None:
            token = torch.cat([torch.atleast_2d(prompt_token).to(token), token], dim=1)
        frames, bins = self.frames(token.shape[1]), self.config.output_size
        if prompt_feat is None:
            prompt_feat = torch.zeros(rows, 0, bins)
        if z is None:
            z = draw_normal((rows, bins, frames), generator)
        sources = nearest_indices(token.shape[1], frames)
        speakers = [None] * rows if embedding is None else embedding
        inputs = [
            FlowInput(token[row], sources, z[row], prompt_feat[row].T, speakers[row]) for row in range(rows)
        ]
        return torch.stack(self.solve_rows(inputs, steps))

    @torch.no_grad()
    def generate(self, inputs: Sequence[FlowInput], steps: int) -> list[Tensor]:
        """Mel of several rows of any lengths, prompt frames dropped; each (80, new frames).

        A row's mel is the same, bit for bit, in any company. The order in which a matrix product or a convolution adds
        depends on the shape of its batch, so the shape of the pass that a row takes part in depends on that row only:

        * On a CPU each row has its own pass. Rows would share nothing but weights there, and arithmetic is the limit.
        * Elsewhere rows share passes of :data:`ROWS_PER_PASS` rows, padded to a multiple of :data:`FRAMES_PER_BUCKET`
          frames. A pass of fewer rows repeats one of them; on an H100 it takes at most 1.4 times as long as that row.
        """
        if not self.shares_passes:
            return [self.solve_rows([row], steps)[0] for row in inputs]
        mels: dict[int, Tensor] = {}
        for frames, members in _shared_passes([row.frames for row in inputs]):
            rows = [inputs[index] for index in members]
            rows += rows[:1] * (ROWS_PER_PASS - len(rows))
            mels |= dict(zip(members, self.solve_rows(rows, steps, frames), strict=False))
        return [mels[index] for index in range(len(inputs))]

    def solve_rows(
        self, inputs: Sequence[FlowInput], steps: int, padded_frames: int | None = None
    ) -> list[Tensor]:
        """:meth:`generate` in one pass.

        Args:
            inputs: rows of any lengths.
            steps: Euler steps.
            padded_frames: mel frames that each row is padded to; None: the longest row's.
        """
        tokens, sources = [row.tokens for row in inputs], [row.sources for row in inputs]
        mu, frame_mask = self.condition(tokens, sources, padded_frames)
        z, cond = torch.zeros_like(mu), torch.zeros_like(mu)
        for index, row in enumerate(inputs):
            z[index, :, : row.frames] = row.noise
            cond[index, :, : row.prompt_mel.shape[1]] = row.prompt_mel
        silent = torch.zeros(self.config.spk_embed_dim)
        speakers = torch.stack([silent if row.speaker is None else row.speaker.cpu() for row in inputs])
        speaker = self.spk_embed_affine_layer(F.normalize(speakers.to(mu), dim=1))
        mel = self.solve(z, mu, speaker, cond, steps, frame_mask)
        return [mel[index, :, row.prompt_mel.shape[1] : row.frames] for index, row in enumerate(inputs)]

    @torch.no_grad()
    def condition(
        self,
        tokens: Sequence[Tensor],
        sources: Sequence[Tensor] | None = None,
        padded_frames: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode codes and stretch them to mel rate.

        Args:
            tokens: rows of codes, each (codes,).
            sources: index of the code that each mel frame repeats; defaults to nearest interpolation to :meth:`frames`.
            padded_frames: mel frames that each row is padded to, and its codes in proportion; None: the longest row's.

        Returns:
            mu (rows, 80, frames) and the frame mask (rows, 1, frames); no mask if rows are equal and not padded.
        """
        counts = [len(row) for row in tokens]
        sources = sources or [nearest_indices(count, self.frames(count)) for count in counts]
        frames = [len(row) for row in sources]
        padded_codes = None if padded_frames is None else self._most_codes(padded_frames)
        padded = torch.zeros(len(counts), padded_codes or max(counts), dtype=torch.long, device=self.device)
        for index, row in enumerate(tokens):
            padded[index, : len(row)] = row
        encoded = self.encode(padded, _length_mask(counts, padded_codes, self.device))
        frame_mask = _length_mask(frames, padded_frames, self.device)
        stretched = encoded.new_zeros(len(frames), encoded.shape[2], padded_frames or max(frames))
        for index, source in enumerate(sources):
            stretched[index, :, : len(source)] = encoded[index, source.to(self.device)].T
        mask = None if frame_mask is None else frame_mask[:, None].to(stretched)
        return self.length_regulator(stretched, mask), mask

    def encode(self, tokens: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Codes (rows, codes) to (rows, codes, 80) at code rate; ``key_mask`` as in :class:`TokenEncoder`."""
        return self.encoder_proj(self.encoder(self.input_embedding(tokens.clamp(min=0)), key_mask))

    @torch.no_grad()
    def solve(
        self,
        z: Tensor,
        mu: Tensor,
        speaker: Tensor,
        cond: Tensor,
        steps: int,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Guided Euler steps from noise to mel (section 5); shapes as :meth:`Estimator.forward`."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        x = z
        times = solver_times(steps).to(z.device)
        t, step = times[0], times[1] - times[0]
        for index in range(1, steps + 1):
            x = x + step * self.velocity(x, mu, t, speaker, cond, mask)
            t = t + step
            if index < steps:
                step = times[index + 1] - t
        return x

    def velocity(
        self, x: Tensor, mu: Tensor, t: Tensor, speaker: Tensor, cond: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Guided velocity: one pass over a doubled batch gives the conditional and the unconditional one."""
        rate = self.config.cfm.inference_cfg_rate
        doubled = [torch.cat([known, torch.zeros_like(known)]) for known in (mu, speaker, cond)]
        both = None if mask is None else torch.cat([mask, mask])
        answer = self.estimator(torch.cat([x, x]), doubled[0], t, doubled[1], doubled[2], both)
        conditional, unconditional = answer.chunk(2)
        return (1 + rate) * conditional - rate * unconditional


class LengthRegulator(nn.Module):
    """Smooths the stretched codes: [conv, norm, Mish] per ratio, then a pointwise conv (section 4.6)."""

    def __init__(self, config: LengthRegulatorConfig, out_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in config.sampling_ratios:
            layers += [
                nn.Conv1d(config.channels, config.channels, 3, padding=1),
                MaskedGroupNorm(1, config.channels),
                nn.Mish(),
            ]
        self.model = nn.Sequential(*layers, nn.Conv1d(config.channels, out_channels, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(rows, channels, frames) to (rows, 80, frames); zero outside ``mask`` (rows, 1, frames)."""
        for layer in self.model:
            x = layer(x, mask) if isinstance(layer, MaskedGroupNorm) else layer(x)
            if mask is not None:
                x = x * mask
        return x


def solver_times(steps: int) -> Tensor:
    """Cosine schedule of ``steps + 1`` times from 0 to 1."""
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * torch.pi)


def nearest_indices(tokens: int, frames: int, start: int = 0) -> Tensor:
    """Index of the code that each mel frame from ``start`` on repeats, in the reference's float32 arithmetic."""
    scale = float(np.float32(tokens) / np.float32(frames))
    position = torch.arange(start, frames, dtype=torch.float32)
    return (position * scale).floor().long().clamp(max=tokens - 1)


def draw_normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers; the generator defaults to one seeded with 42."""
    generator = generator or torch.Generator().manual_seed(DEFAULT_SEED)
    return torch.randn(shape, generator=generator, device=generator.device)


def _shared_passes(frames: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Padded length and rows, given by index, of each pass; ``frames`` is the length of each row."""
    buckets: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(frames):
        buckets[-(-length // FRAMES_PER_BUCKET) * FRAMES_PER_BUCKET].append(index)
    for padded, members in buckets.items():
        for first in range(0, len(members), ROWS_PER_PASS):
            yield padded, members[first : first + ROWS_PER_PASS]


def _length_mask(lengths: Sequence[int], padded: int | None, device: torch.device) -> Tensor | None:
    """(rows, padded length), True inside each row; None if rows are equal and there is no padded length."""
    if padded is None and min(lengths) == max(lengths):
        return None
    positions = torch.arange(padded or max(lengths), device=device)
    return positions < torch.tensor(lengths, device=device)[:, None]
