"""The embedded codec: k-means over log-mel patches, decoded with Griffin-Lim.

It replaces a neural codec, with the same interface, and needs no download: it is fitted on the
training audio in a minute. A code is the index of the nearest of a few hundred patches of 80 ms. Each code also
keeps the mean linear spectrum of its patches, so decoding starts from spectra with the harmonics of real voices
instead of an inverted mel filterbank.

Loudness is normalised before encoding: the same word spoken softly gets the same codes. A code therefore depends on
the whole clip, and :meth:`MelVQTokenizer.encode_stream` returns all codes at the end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vita_audio.audio.base import AudioLike, AudioStream, AudioTokenizer
from vita_audio.audio.folders import MEL_VQ, WeightsError, check_folder
from vita_audio.audio.io import load_audio
from vita_audio.audio.spectrogram import GriffinLim, mel_filters, stft

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
_BATCH_PATCHES = 4096  # per step of the k-means


@dataclass(frozen=True)
class MelVQConfig:
    """Settings of analysis and synthesis.

    Attributes:
        sample_rate: sample rate in Hz of analysis and of decoded speech.
        fft_size: samples in an analysis window.
        hop: samples between frames.
        mels: mel bands.
        patch_frames: frames in one code.
        codebook_size: number of codes.
        floor: added to mel magnitudes before the logarithm; about the level of background noise,
            which reserves codes for speech.
        level: root mean square to which speech is normalised before encoding.
        iterations: iterations of Griffin-Lim.
        block_codes: codes whose phases are solved together; a stream waits for a full block.
        lookahead_codes: further codes that a stream waits for.
    """

    sample_rate: int = 16_000
    fft_size: int = 640
    hop: int = 160
    mels: int = 80
    patch_frames: int = 8
    codebook_size: int = 512
    floor: float = 0.005
    level: float = 0.1
    iterations: int = 32
    block_codes: int = 4
    lookahead_codes: int = 1

    @property
    def patch_samples(self) -> int:
        return self.hop * self.patch_frames


class MelVQTokenizer(AudioTokenizer):
    """Codes of log-mel patches; see the module's docstring.

    Args:
        config: analysis and synthesis.
        codebook: centroids of log-mel patches, shape (codebook_size, patch_frames * mels).
        spectra: magnitudes of each code, shape (codebook_size, patch_frames, fft_size // 2 + 1).
    """

    kind = "mel_vq"

    def __init__(self, config: MelVQConfig, codebook: Tensor, spectra: Tensor, device: str = "cpu"):
        self.config = config
        self.sample_rate = self.input_sample_rate = config.sample_rate
        self.frame_rate = config.sample_rate / config.patch_samples
        self.codebook_size = config.codebook_size
        self.codebook = codebook
        self.spectra = spectra
        self._fingerprint = _digest(config, codebook, spectra)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        flow_path: str | PathLike[str] | None = None,
        device: str = "cpu",
    ) -> MelVQTokenizer:
        """Open a folder written by :meth:`save_pretrained`.

        Args:
            path: the folder.
            flow_path: ignored; this codec stores its decoder with its codebook.
            device: ignored; the work is small and stays on the CPU.

        Raises:
            WeightsError: the folder lacks a file or holds another kind, or a file is damaged.
        """
        if path is None:
            raise WeightsError(
                "the mel_vq codec needs a folder written by tools/quickstart/fit_mel_vq.py; none was given"
            )
        folder = check_folder(path, MEL_VQ, cls.kind, (_CONFIG_FILE, _WEIGHTS_FILE))
        try:
            fields = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
            fields.pop("kind", None)
            config = MelVQConfig(**fields)
            weights = load_file(folder / _WEIGHTS_FILE)
            return cls(config, weights["codebook"], weights["spectra"])
        except (json.JSONDecodeError, TypeError, KeyError, SafetensorError) as error:
            raise WeightsError(f"{folder}: not a mel_vq codec: {error}; fit it again") from error

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codebook": self.codebook, "spectra": self.spectra}, folder / _WEIGHTS_FILE)
        fields = {"kind": self.kind, **asdict(self.config)}
        (folder / _CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def fit(
        cls,
        audios: Iterable[AudioLike],
        config: MelVQConfig | None = None,
        *,
        seed: int = 0,
        epochs: int = 10,
        on_epoch: Callable[[int], None] | None = None,
    ) -> MelVQTokenizer:
        """Fit a codebook to a collection of speech.

        Args:
            audios: clips; each contributes all its patches.
            seed: seed of the k-means; the same clips and seed give the same codec.
            epochs: passes over the patches.
            on_epoch: called with the number of completed passes.

        Raises:
            ValueError: fewer patches than codes.
        """
        config = config or MelVQConfig()
        patches, magnitudes = [], []
        for audio in audios:
            spectrum = _magnitudes(audio, config)
            patches.append(_log_mel_patches(spectrum, config))
            magnitudes.append(spectrum.half())
        points = torch.cat(patches) if patches else torch.zeros(0)
        if len(points) < config.codebook_size:
            raise ValueError(
                f"{len(points)} patches of speech are too few for {config.codebook_size} codes; give more audio"
            )
        codebook = _k_means(points, config.codebook_size, seed, epochs, on_epoch)
        spectra = _mean_spectra(magnitudes, _nearest(points, codebook), config)
        return cls(config, codebook, spectra)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, audio: AudioLike) -> list[int]:
        patches = _log_mel_patches(_magnitudes(audio, self.config), self.config)
        return _nearest(patches, self.codebook).tolist()

    def decode(
        self, tokens: Sequence[int], steps: int = 10, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.stream(generator).push(tokens, last=True)

    def stream(self, generator: torch.Generator | None = None) -> MelVQStream:
        return MelVQStream(self)


class MelVQStream(AudioStream):
    """Incremental decoding; the samples equal those of :meth:`MelVQTokenizer.decode` exactly.

    Output lags at most ``block_codes + lookahead_codes`` codes behind the input.
    """

    def __init__(self, codec: MelVQTokenizer):
        config = codec.config
        self._codec = codec
        self._synthesis = GriffinLim(
            config.fft_size,
            config.hop,
            block=config.block_codes * config.patch_frames,
            lookahead=config.lookahead_codes * config.patch_frames,
            iterations=config.iterations,
        )

    def push(self, tokens: Sequence[int], last: bool = False) -> Tensor:
        codes = torch.as_tensor(list(tokens), dtype=torch.long)
        outside = (codes < 0) | (codes >= self._codec.codebook_size)
        if outside.any():
            raise ValueError(
                f"code {codes[outside][0].item()} is outside the codebook of {self._codec.codebook_size}"
            )
        return self._synthesis.push(self._codec.spectra[codes].flatten(0, 1), last).clamp(-1, 1)

    @property
    def missing(self) -> int:
        """See :attr:`AudioStream.missing`."""
        return self._synthesis.missing // self._codec.config.patch_frames


def _magnitudes(audio: AudioLike, config: MelVQConfig) -> Tensor:
    """Spectrogram of a clip at normal loudness, whole patches, shape (frames, fft_size // 2 + 1)."""
    waveform, _ = load_audio(audio, config.sample_rate)
    waveform = waveform * (config.level / waveform.square().mean().sqrt().clamp(min=1e-4))
    waveform = torch.nn.functional.pad(waveform, (0, -len(waveform) % config.patch_samples))
    return stft(waveform, config.fft_size, config.hop).abs()


def _log_mel_patches(magnitudes: Tensor, config: MelVQConfig) -> Tensor:
    """Shape (patches, patch_frames * mels)."""
    mel = magnitudes @ mel_filters(config.sample_rate, config.fft_size, config.mels)
    return (mel + config.floor).log().reshape(-1, config.patch_frames * config.mels)


def _nearest(patches: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest centroid of every patch, shape (patches,)."""
    half_norms = codebook.square().sum(1) / 2
    return torch.cat([(half_norms - part @ codebook.T).argmin(1) for part in patches.split(4096)])


def _k_means(
    points: Tensor, clusters: int, seed: int, epochs: int, on_epoch: Callable[[int], None] | None
) -> Tensor:
    """Centroids, shape (clusters, dimensions)."""
    from sklearn.cluster import MiniBatchKMeans

    k_means = MiniBatchKMeans(clusters, batch_size=_BATCH_PATCHES, n_init=1, random_state=seed)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(points), generator=generator)
        for batch in order.split(max(_BATCH_PATCHES, clusters)):
            if len(batch) >= clusters:
                k_means.partial_fit(points[batch].numpy())
        if on_epoch:
            on_epoch(epoch + 1)
    return torch.from_numpy(k_means.cluster_centers_).float().contiguous()


def _mean_spectra(magnitudes: list[Tensor], codes: Tensor, config: MelVQConfig) -> Tensor:
    """Mean magnitude of every code's patches, shape (codebook_size, patch_frames, bins)."""
    bins = config.fft_size // 2 + 1
    total = torch.zeros(config.codebook_size, config.patch_frames, bins)
    first = 0
    for spectrum in magnitudes:
        patches = spectrum.float().reshape(-1, config.patch_frames, bins)
        total.index_add_(0, codes[first : first + len(patches)], patches)
        first += len(patches)
    return total / torch.bincount(codes, minlength=config.codebook_size).clamp(min=1)[:, None, None]


def _digest(config: MelVQConfig, *weights: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(asdict(config)).encode())
    for tensor in weights:
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"mel_vq-{digest.hexdigest()[:12]}"
