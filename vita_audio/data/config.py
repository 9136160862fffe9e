"""Configuration of the training data: which data, and how it becomes rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vita_audio.chat import default_data_root
from vita_audio.chat.interleave import check_ratio
from vita_audio.constants import DEFAULT_TEXT_AUDIO_RATIO
from vita_audio.data.packing import OPEN_ROWS, PATIENCE

_LOWEST_FRAME_RATE = 12.5
"""Speech codes per second, the same for all codecs here; determines the longest clip that fits a row."""


@dataclass
class DataConfig:
    """The training data, and how it becomes rows.

    Attributes:
        dataset_path: YAML of the mix.
        seq_length: tokens in a row.
        text_audio_interval_ratio: text and speech run lengths of interleaved replies.
        num_workers: worker processes of this rank; 0: load in the trainer's own process.
        micro_batch_size: rows in a batch.
        max_error_share: the run stops when more samples than this are unusable.
        strict: refuse to start when a file of the mix is missing.
        token_cache: folder written by tools/tokenize_audio.py.
        data_root: base of relative paths; defaults to ``$ROOT_PATH``, else the YAML's folder.
        default_system_message: for samples without a system message.
        max_audio_seconds: longer clips are refused before they are read; defaults to the length of a row at 12.5
            codes per second.
        open_rows: the packer's look-ahead, in rows.
        patience: rows after which a waiting row is finished, see :mod:`vita_audio.data.packing`.
        arrow_cache: folder for the memory-mapped copies of ``datasets``; defaults to its HF_DATASETS_CACHE.
    """

    dataset_path: str | Path
    seq_length: int = 8192
    text_audio_interval_ratio: Sequence[int] = DEFAULT_TEXT_AUDIO_RATIO
    num_workers: int = 8
    micro_batch_size: int = 1
    max_error_share: float = 0.05
    strict: bool = False
    token_cache: str | Path | None = None
    data_root: str | Path | None = None
    default_system_message: str | None = None
    max_audio_seconds: float | None = None
    open_rows: int = OPEN_ROWS
    patience: int = PATIENCE
    arrow_cache: str | None = None

    def __post_init__(self) -> None:
        check_ratio(self.text_audio_interval_ratio)
        if self.seq_length < 1 or self.micro_batch_size < 1 or self.num_workers < 0:
            raise ValueError("seq_length and micro_batch_size must be positive, num_workers not negative")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"max_error_share must be between 0 and 1, it is {self.max_error_share}")

    @property
    def root(self) -> Path:
        """Base folder of relative paths."""
        return default_data_root(self.dataset_path) if self.data_root is None else Path(self.data_root)

    @property
    def longest_clip(self) -> float:
        """Seconds of the longest clip that is read."""
        if self.max_audio_seconds is not None:
            return self.max_audio_seconds
        return self.seq_length / _LOWEST_FRAME_RATE
