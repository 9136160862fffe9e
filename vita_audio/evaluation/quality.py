"""How natural speech sounds, as a network predicts it from the sound alone: DNSMOS (Reddy et al., 2021).

The package ``speechmos`` has its weights (ONNX). The score is the predicted mean opinion, from 1 to 5, of clips at
16 kHz. It knows neither text nor voice, so it stands beside WER and SIM and replaces neither.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vita_audio.audio import load_audio
from vita_audio.evaluation.transcribers import RECOGNISER_RATE

QUALITY_MODELS = ("dnsmos",)


def check_quality(name: str) -> None:
    """
    Raises:
        ValueError: the name is unknown, or the packages are not installed.
    """
    if name not in QUALITY_MODELS:
        raise ValueError(f"unknown quality model {name!r}; known: {', '.join(QUALITY_MODELS)}")
    for package in ("speechmos", "onnxruntime"):
        if find_spec(package) is None:
            raise ValueError(f"the {name} score needs {package}; pip install -e '.[mos]'")


def describe_quality(name: str) -> str:
    """A description for readers of scores, which also changes with the weights."""
    return f"{name}, speechmos {version('speechmos')}"


class Dnsmos:
    """The overall DNSMOS score of audio files.

    Raises:
        ValueError: see :func:`check_quality`.
    """

    def __init__(self) -> None:
        check_quality("dnsmos")
        self._package: Any = import_module("speechmos.dnsmos")

    def score(self, path: Path) -> float:
        """The predicted opinion of a clip, 1 to 5."""
        waveform, rate = load_audio(path, RECOGNISER_RATE)
        return float(self._package.run(waveform.clamp(-1, 1).numpy(), rate)["ovrl_mos"])
