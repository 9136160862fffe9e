"""Encoding streams that do not depend on one codec."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vita_audio.audio.base import AudioTokenizer, EncodeStream
from vita_audio.audio.memory import to_piece


class WholeClipStream(EncodeStream):
    """Collects the pieces and encodes the clip when it ends.

    The codes are those of :meth:`AudioTokenizer.encode` by construction.

    Args:
        codec: encodes the clip.
        sample_rate: of the pieces in Hz; defaults to the codec's ``input_sample_rate``.
    """

    def __init__(self, codec: AudioTokenizer, sample_rate: int | None = None):
        self._codec = codec
        self._sample_rate = sample_rate or codec.input_sample_rate
        self._pieces: list[Tensor] = []

    def push(self, waveform: Tensor | np.ndarray, last: bool = False) -> list[int]:
        """See :meth:`EncodeStream.push`; returns no codes before the last piece."""
        self._pieces.append(to_piece(waveform))
        if not last:
            return []
        clip, self._pieces = torch.cat(self._pieces), []
        return self._codec.encode((clip, self._sample_rate)) if len(clip) else []
