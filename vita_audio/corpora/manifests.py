"""Corpora that lhotse reads: its recipes know the layouts of a hundred publishers.

A recipe opens every recording to learn its duration, and stops at the first damaged one. Here it asks the project's
own reader through an audio backend that gives a damaged recording a placeholder, so the recipe lists it, and the
check that follows rejects it with the true reason.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from vita_audio.audio import AudioError
from vita_audio.audio.io import audio_duration
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Utterance
from vita_audio.corpora.layouts import Listed, SourceError
from vita_audio.extras import needs_extra

_PLACEHOLDER_RATE = 16_000
_MOST_OVERLAP = 0.2
"""Share of a segment in which somebody else may speak."""


@dataclass(frozen=True, kw_only=True)
class LhotseCorpus(Listed):
    """A corpus through ``lhotse.recipes.prepare_RECIPE``; the pattern is its folder.

    Attributes:
        above: the corpus is so many folders above the match, which is then only one part of it.
        recipe: name in lhotse.
        parts: of its manifests; empty: all.
        arguments: of the recipe.
    """

    recipe: str
    above: int = 0
    parts: tuple[str, ...] | list[str] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        skipped = _Skipped()
        folder = folder.parents[self.above - 1] if self.above else folder
        manifests = self._manifests(folder, skipped)
        yield from skipped.items(folder)
        parts = [str(part) for part in self.parts] or sorted(manifests)
        for part in parts:
            if part not in manifests:
                raise SourceError(
                    f"{folder}: lhotse's {self.recipe} finds {', '.join(manifests)}, but not {part}"
                )
            yield from _utterances(*_sorted_out(manifests[part]))

    def _manifests(self, folder: Path, skipped: _Skipped) -> dict[str, Any]:
        with needs_extra("corpora"):
            from lhotse.audio.backend import audio_backend
        try:
            prepare = getattr(import_module(f"lhotse.recipes.{self.recipe}"), f"prepare_{self.recipe}")
        except (ImportError, AttributeError) as error:
            raise SourceError(f"lhotse has no recipe {self.recipe!r}") from error
        try:
            with audio_backend(_backend()), skipped.listening():
                manifests: dict[str, Any] = prepare(folder, **self.arguments)
        except (OSError, AssertionError, ValueError, KeyError, IndexError) as error:
            raise SourceError(
                f"{folder}: lhotse's {self.recipe} cannot read it, it needs the complete release: {error}"
            ) from error
        return manifests


class _Skipped(logging.Handler):
    """What a recipe left out: it logs every file without a transcript and every transcript without a file."""

    _REASONS = (("No transcript", Rejection.NO_TRANSCRIPT), ("No such file", Rejection.NO_AUDIO))

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Collect what is logged at the root, where recipes log, instead of showing it."""
        root = logging.getLogger()
        handlers, level = root.handlers, root.level
        root.handlers, root.level = [self], logging.WARNING
        try:
            yield
        finally:
            root.handlers, root.level = handlers, level

    def items(self, folder: Path) -> Iterator[Broken]:
        for message in self._messages:
            reason = next((reason for start, reason in self._REASONS if message.startswith(start)), None)
            if reason is not None:
                yield Broken(message.split(": ", 1)[-1], reason, f"{folder}: {message}")


def _backend() -> Any:
    from lhotse.audio.backend import AudioBackend, LibsndfileCompatibleAudioInfo

    class CheckedAudio(AudioBackend):
        """Durations from the project's own reader."""

        def info(self, path_or_fd: Any, force_opus_sampling_rate: int | None = None) -> Any:
            try:
                seconds = audio_duration(path_or_fd)
            except AudioError:
                seconds = 1.0
            frames = max(1, round(seconds * _PLACEHOLDER_RATE))
            duration = frames / _PLACEHOLDER_RATE
            return LibsndfileCompatibleAudioInfo(1, frames, _PLACEHOLDER_RATE, duration)

        def supports_info(self) -> bool:
            return True

    return CheckedAudio()


def _sorted_out(manifests: Mapping[str, Any]) -> tuple[Any, Any]:
    """Recordings and supervisions; lhotse 1.33 returns those of AISHELL-3 under each other's names."""
    from lhotse import RecordingSet

    first, second = manifests["recordings"], manifests["supervisions"]
    return (first, second) if isinstance(first, RecordingSet) else (second, first)


def _utterances(recordings: Any, supervisions: Any) -> Iterator[Utterance | Broken]:
    by_recording: dict[str, list[Any]] = defaultdict(list)
    for segment in supervisions:
        by_recording[segment.recording_id].append(segment)
    for recording in recordings:
        path = recording.sources[0].source
        segments = sorted(
            by_recording.pop(recording.id, []), key=lambda segment: (segment.start, segment.end)
        )
        whole = len(segments) == 1 and segments[0].duration >= recording.duration - 0.01
        for segment in segments:
            clip = Clip(path) if whole else Clip(path, segment.start, segment.end)
            if _overlap(segment, segments) > _MOST_OVERLAP * segment.duration:
                yield Broken(
                    segment.id, Rejection.OVERLAP, f"{path}: somebody else speaks during {segment.id}"
                )
            else:
                yield Utterance(segment.id, segment.text or "", clip, segment.speaker)


def _overlap(segment: Any, segments: list[Any]) -> float:
    """Seconds in which another segment of the recording runs too."""
    return sum(
        max(0.0, min(segment.end, other.end) - max(segment.start, other.start))
        for other in segments
        if other is not segment
    )
