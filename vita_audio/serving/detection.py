"""Speech or silence: silero-vad, one window of 32 ms at a time, and the turns that follow from it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vita_audio.extras import needs_extra

RATE = 16_000
WINDOW = 512
"""Samples of a window."""

_HYSTERESIS = 0.15
"""How far below the threshold the probability must fall to count as silence; silero-vad's own value."""


@dataclass(frozen=True)
class Turn:
    """A change between silence and speech.

    Attributes:
        kind: speech has started, or stopped.
        sample: where, in samples of 16 kHz since the detector began.
    """

    kind: Literal["started", "stopped"]
    sample: int


class TurnDetector:
    """Finds the turns of one speaker.

    Args:
        threshold: probability above which a window is speech.
        silence_ms: silence that ends a turn, in ms.
    """

    def __init__(self, threshold: float = 0.5, silence_ms: int = 500):
        self._threshold = threshold
        self._silence = silence_ms * RATE // 1000
        self._model = load_model()
        self._rest = torch.empty(0)
        self._heard = 0
        self.speech_until: int | None = None
        """End of the speech so far, in samples; None: no turn is open."""

    def push(self, samples: Tensor) -> list[Turn]:
        """The turns that further samples, (samples,) float32 at 16 kHz, complete."""
        self._rest = torch.cat([self._rest, samples])
        turns: list[Turn] = []
        while len(self._rest) >= WINDOW:
            window, self._rest = self._rest[:WINDOW], self._rest[WINDOW:]
            with torch.inference_mode():
                probability = float(self._model(window[None], RATE))
            turns += self._decide(probability)
        return turns

    def _decide(self, probability: float) -> list[Turn]:
        start = self._heard
        self._heard += WINDOW
        if probability >= self._threshold:
            began = self.speech_until is None
            self.speech_until = self._heard
            return [Turn("started", start)] if began else []
        if self.speech_until is None:
            return []
        if probability >= self._threshold - _HYSTERESIS:
            self.speech_until = self._heard
        elif self._heard - self.speech_until >= self._silence:
            ended, self.speech_until = self.speech_until, None
            return [Turn("stopped", ended)]
        return []


def load_model() -> Any:
    """The network, with a state of its own.

    Raises:
        ModuleNotFoundError: silero-vad is not installed.
    """
    return deepcopy(_network())


@lru_cache(maxsize=1)
def _network() -> Any:
    """The network as it is copied. The package is not imported: its import sets torch to one thread."""
    with needs_extra("serve"):
        package = find_spec("silero_vad")
        if package is None or not package.submodule_search_locations:
            raise ModuleNotFoundError("silero-vad is not installed", name="silero_vad")
    file = Path(package.submodule_search_locations[0]) / "data" / "silero_vad.jit"
    model: Any = torch.jit.load(file, map_location="cpu").eval()
    with torch.inference_mode():
        for _ in range(3):  # the first runs compile it, which would delay the first listener by 0.2 s
            model(torch.zeros(1, WINDOW), RATE)
    model.reset_states()
    return model
