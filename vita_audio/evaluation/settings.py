"""What an evaluation scores, and how: test sets, checkpoints and settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vita_audio.evaluation.bench import SPOKEN_REPLY_TOKENS
from vita_audio.evaluation.items import BenchmarkItem
from vita_audio.evaluation.modes import mode_fields
from vita_audio.evaluation.quality import check_quality, describe_quality
from vita_audio.evaluation.results import fingerprint_of, items_fingerprint
from vita_audio.evaluation.similarity import SpeakerConfig
from vita_audio.evaluation.tasks import Task, published_options
from vita_audio.evaluation.transcribers import TranscriberConfig
from vita_audio.inference import GenerationOptions

DECODINGS = ("greedy", "published")


@dataclass(frozen=True)
class BenchmarkSet:
    """A test set and its task.

    Attributes:
        name: name of its result files, unique among the sets.
        recogniser: transcribes the speech; None if the task has no speech output.
        speaker: compares the voice with the requested one; None: not compared.
        quality: of :data:`~vita_audio.evaluation.quality.QUALITY_MODELS`; None: not measured.
        decoding: of :data:`DECODINGS`, the one that its scores are published with; None: that of the settings.
        published: rows that others published, with their source.
        prepared: the checksum of the whole set when ``tools/prepare_benchmark.py`` wrote it; None: not compared.
    """

    name: str
    task: Task
    path: Path
    items: Sequence[BenchmarkItem]
    recogniser: TranscriberConfig | None = None
    speaker: SpeakerConfig | None = None
    quality: str | None = None
    decoding: str | None = None
    published: Sequence[Mapping[str, Any]] = ()
    prepared: str | None = None

    @cached_property
    def checksum(self) -> str:
        """A digest of the file, its items and their recordings."""
        return items_fingerprint(self.path, self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of its content, its task, its recogniser and its speaker embedding."""
        heard_by = None if self.recogniser is None else self.recogniser.fingerprint()
        compared_by = None if self.speaker is None else self.speaker.fingerprint()
        judged_by = [] if self.quality is None else [describe_quality(self.quality)]
        return fingerprint_of(repr(self.task), self.checksum, heard_by, compared_by, *judged_by)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a reader of its scores needs to repeat them."""
        return {
            "task": self.task.name,
            "items": len(self.items),
            "file": str(self.path),
            "checksum": self.checksum,
            "recogniser": None if self.recogniser is None else self.recogniser.describe(),
            "speaker": None if self.speaker is None else self.speaker.describe(),
            "quality": None if self.quality is None else describe_quality(self.quality),
            "normaliser": getattr(self.task, "text_normaliser", None),
            "published": list(self.published),
        }

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes that readers of its scores need."""
        notes = []
        if self.prepared not in (None, self.checksum):
            notes.append(
                f"{self.name}: changed since tools/prepare_benchmark.py wrote it, so its scores are not comparable"
            )
        foreign = sum(not self.task.is_as_trained(item) for item in self.items)
        if foreign:
            notes.append(
                f"{self.name}: {foreign} of {len(self.items)} prompts differ in wording from the training data "
                "(docs/data.md), so these scores say little about the model"
            )
        if self.recogniser is not None:
            notes.append(f"{self.name}: heard by {self.recogniser.describe()}")
        if self.speaker is not None:
            notes.append(f"{self.name}: voices compared by {self.speaker.describe()}")
        return tuple(notes)


@dataclass(frozen=True)
class Checkpoint:
    """A model in the table.

    Attributes:
        stage: its name in the table.
        modes: to score, see :mod:`~vita_audio.evaluation.modes`.
    """

    stage: str
    folder: Path
    modes: Sequence[str]


@dataclass(frozen=True)
class Settings:
    """Settings of an evaluation.

    Attributes:
        decodings: of :data:`DECODINGS`: ``greedy`` takes the most likely token without a repetition penalty, so a
            row is reproducible on any machine; ``published`` uses the decoding of the published figures.
        given: options for all tasks that override the decodings; their mode is ignored.
        max_new_tokens: maximum length of a reply.
        batch_size: replies generated together.
        seed: seed of sampled replies.
        samples: how often sampled replies are drawn; with several, scores are means.
        system_prompt: system message of questions that have none; ``auto``: the checkpoint's.
        speed_items: replies timed; 0 for none.
        transcriber_processes: number of recogniser processes; 0 recognises in this process.
        recordings: also recognise the test sets' reference recordings.
        single: write result files directly into the output folder; for one checkpoint in one mode.
        codec: fingerprint of codec and runtime.
    """

    decodings: Sequence[str] = ("greedy",)
    given: GenerationOptions | None = None
    max_new_tokens: int = SPOKEN_REPLY_TOKENS
    batch_size: int = 32
    seed: int = 42
    samples: int = 1
    system_prompt: str = "auto"
    speed_items: int = 5
    transcriber_processes: int = 2
    recordings: bool = True
    single: bool = False
    codec: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("batch_size", 1),
            ("samples", 1),
            ("speed_items", 0),
            ("transcriber_processes", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: give {least} or more")
        unknown = [name for name in self.decodings if name not in DECODINGS]
        if unknown:
            raise ValueError(f"--decoding {unknown[0]}: use {', '.join(DECODINGS)}")

    def options(self, task: Task, mode: str, decoding: str) -> GenerationOptions:
        """Generation options for a task."""
        if self.given is not None:
            return replace(self.given, mode=mode)
        fields = {"max_new_tokens": self.max_new_tokens, **mode_fields(mode)}
        if decoding == "greedy":
            return GenerationOptions.greedy(**fields)
        drawn = GenerationOptions(seed=self.seed, **fields)
        return published_options(task, drawn)


def check(checkpoints: Sequence[Checkpoint], sets: Sequence[BenchmarkSet], settings: Settings) -> None:
    """Refuse settings that would fail later, before anything is loaded or written.

    Raises:
        ValueError: a recogniser or speaker embedding cannot be opened, or two rows would share a folder.
    """
    for recogniser in dict.fromkeys(one.recogniser for one in sets if one.recogniser is not None):
        recogniser.check()
    for speaker in dict.fromkeys(one.speaker for one in sets if one.speaker is not None):
        speaker.check()
    for quality in {one.quality for one in sets} - {None}:
        check_quality(str(quality))
    folders = Counter(
        folder_name(checkpoint.stage, mode, decoding)
        for checkpoint in checkpoints
        for mode in checkpoint.modes
        for decoding in settings.decodings
    )
    twice = [folder for folder, count in folders.items() if count > 1]
    if twice:
        raise ValueError(f"two rows would be written to {twice[0]}; give each checkpoint and mode once")


def folder_name(stage: str, mode: str, decoding: str) -> str:
    """Folder of a row's result files."""
    return "-".join([stage, mode.replace(" ", "-"), *([decoding] if decoding != "greedy" else [])])
