"""Which utterances become samples: limits, and the reason of every rejection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from vita_audio.corpora.items import Rejected
from vita_audio.corpora.text import characters, is_doubled, is_of

_FRAME_SECONDS = 0.03
_FULL_SCALE = 0.999


class Rejection(StrEnum):
    """Why an item did not become a sample, besides the reasons of samples and of audio.

    Those are the values of :class:`vita_audio.chat.Reason`, and ``audio_`` with a reason of
    :class:`vita_audio.audio.AudioError`.
    """

    BAD_ROW = "bad_row"
    DAMAGED_FILE = "damaged_file"
    NO_AUDIO = "no_audio"
    NO_TRANSCRIPT = "no_transcript"
    REPEATED = "repeated"
    OVERLAP = "overlap"
    EMPTY_TEXT = "empty_text"
    DOUBLED_TEXT = "doubled_text"
    OTHER_LANGUAGE = "other_language"
    TOO_SHORT = "too_short"
    TOO_LONG = "too_long"
    SLOW_SPEECH = "slow_speech"
    FAST_SPEECH = "fast_speech"
    CLIPPED = "clipped"
    SILENT = "silent"
    DISAGREES = "disagrees"
    IN_TEST_SET = "in_test_set"
    NO_PROMPT = "no_prompt"
    UNSPEAKABLE = "unspeakable"


@dataclass(frozen=True)
class Cleaning:
    """Limits of an utterance.

    Attributes:
        min_seconds, max_seconds: duration of a clip.
        min_speed, max_speed: letters and digits per second; a Chinese character counts as three.
        max_clipped: share of samples at full scale.
        max_silence: share of 30 ms frames more than 40 dB below the loudest.
        min_level: RMS of the loudest tenth of the frames, in dB below full scale.
        max_wer: word error rate of a recogniser's transcript (Chinese: of characters); needs a recogniser.
    """

    min_seconds: float = 0.4
    max_seconds: float = 120.0
    min_speed: float = 2.0
    max_speed: float = 35.0
    max_clipped: float = 0.01
    max_silence: float = 0.8
    min_level: float = -50.0
    max_wer: float = 0.3

    def __post_init__(self) -> None:
        for name in ("seconds", "speed"):
            if not 0 <= getattr(self, f"min_{name}") < getattr(self, f"max_{name}"):
                raise ValueError(f"min_{name} must be at least 0 and below max_{name}")

    def check_text(self, text: str, languages: tuple[str, ...]) -> None:
        """Refuse a transcript.

        Raises:
            Rejected: it is empty, doubled, or of another language.
        """
        if not characters(text):
            raise Rejected(Rejection.EMPTY_TEXT, f"the text {text!r:.80} has no letter or digit")
        if is_doubled(text):
            raise Rejected(Rejection.DOUBLED_TEXT, f"the text is written twice: {text!r:.80}")
        if not is_of(text, languages):
            raise Rejected(
                Rejection.OTHER_LANGUAGE, f"the text is not {' or '.join(languages)}: {text!r:.80}"
            )

    def check_speed(self, text: str, seconds: float) -> None:
        """Refuse a clip whose text cannot be what it says.

        Raises:
            Rejected: it is too short, too long, too slow or too fast.
        """
        if seconds < self.min_seconds:
            raise Rejected(Rejection.TOO_SHORT, f"{seconds:.2f} s, the least is {self.min_seconds:g} s")
        if seconds > self.max_seconds:
            raise Rejected(Rejection.TOO_LONG, f"{seconds:.1f} s, the most is {self.max_seconds:g} s")
        speed = speech_speed(text, seconds)
        if speed < self.min_speed:
            raise Rejected(
                Rejection.SLOW_SPEECH, f"{speed:.1f} characters/s, the least is {self.min_speed:g}"
            )
        if speed > self.max_speed:
            raise Rejected(Rejection.FAST_SPEECH, f"{speed:.1f} characters/s, the most is {self.max_speed:g}")

    def check_waveform(self, waveform: Tensor, rate: int) -> None:
        """Refuse a recording by its samples, (samples,).

        Raises:
            Rejected: it is clipped or silent.
        """
        clipped = float((waveform.abs() >= _FULL_SCALE).float().mean())
        if clipped > self.max_clipped:
            raise Rejected(Rejection.CLIPPED, f"{clipped:.1%} of the samples are at full scale")
        length = max(1, int(rate * _FRAME_SECONDS))
        whole = waveform[: len(waveform) // length * length]
        frames = whole.reshape(-1, length) if len(whole) else waveform[None]
        level = 10 * torch.log10(frames.square().mean(dim=1) + 1e-12)
        loud = float(level.quantile(0.9)) if len(level) < 1_000_000 else float(level.max())
        if loud < self.min_level:
            raise Rejected(Rejection.SILENT, f"{loud:.0f} dB, the least is {self.min_level:g} dB")
        silence = float((level < float(level.max()) - 40).float().mean())
        if silence > self.max_silence:
            raise Rejected(Rejection.SILENT, f"{silence:.0%} of it is silence")


class Recogniser(Protocol):
    """Agreement of a clip with its text."""

    def __call__(self, waveform: Tensor, rate: int, text: str) -> tuple[float, str]:
        """Error rate of the transcript of a waveform of shape (samples,), and the transcript."""


def speech_speed(text: str, seconds: float) -> float:
    """Letters and digits per second; a Chinese character counts as three, so one scale fits both languages."""
    han = sum("\u3400" <= character <= "\u9fff" for character in text)
    return (characters(text) + 2 * han) / max(seconds, 1e-3)


@dataclass
class Tally:
    """Counts of an output, or of a part of it.

    Attributes:
        read: items.
        samples: lines written.
        rejected: items by reason.
        seconds: of speech in kept items.
        histograms: by quantity and ``before`` or ``after``: counts by whole number.
    """

    read: int = 0
    samples: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    histograms: dict[str, dict[str, Counter[int]]] = field(default_factory=dict)

    def measure(self, when: str, text: str, seconds: float) -> None:
        """Add a clip to the histograms of ``"before"`` or ``"after"`` the checks."""
        for name, value in (("seconds", seconds), ("characters per second", speech_speed(text, seconds))):
            counts = self.histograms.setdefault(name, {}).setdefault(when, Counter())
            counts[min(int(value), 120)] += 1

    def add(self, other: Tally) -> None:
        self.read += other.read
        self.samples += other.samples
        self.rejected.update(other.rejected)
        self.seconds += other.seconds
        for name, stages in other.histograms.items():
            for when, counts in stages.items():
                self.histograms.setdefault(name, {}).setdefault(when, Counter()).update(counts)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "read": self.read,
            "samples": self.samples,
            "hours": round(self.seconds / 3600, 4),
            "seconds": self.seconds,
            "rejected": dict(sorted(self.rejected.items())),
            "histograms": {
                name: {
                    when: {str(value): counts[value] for value in sorted(counts)}
                    for when, counts in sorted(stages.items())
                }
                for name, stages in sorted(self.histograms.items())
            },
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Tally:
        """The counts that :meth:`to_dict` made."""
        histograms = {
            name: {
                when: Counter({int(value): count for value, count in counts.items()})
                for when, counts in stages.items()
            }
            for name, stages in content["histograms"].items()
        }
        return cls(
            content["read"],
            content["samples"],
            Counter(content["rejected"]),
            content["seconds"],
            histograms,
        )
