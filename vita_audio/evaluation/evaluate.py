"""Scores checkpoints, in several modes, on test sets.

Every test set is scored separately, in ``OUTPUT_DIR/STAGE-MODE/``: its utterances, their WAV files and its scores.
Valid earlier scores (:mod:`~vita_audio.evaluation.results`) are not computed again, and a checkpoint is loaded
only if one of its scores is missing.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vita_audio.distributed import is_first
from vita_audio.evaluation.benchmarks import (
    SPOKEN_REPLY_TOKENS,
    Bench,
    BenchmarkItem,
    Listener,
    Utterance,
    with_system,
)
from vita_audio.evaluation.results import (
    checkpoint_fingerprint,
    fingerprint_of,
    items_fingerprint,
    keep_scores,
)
from vita_audio.evaluation.scoreboard import Row, set_keys, write_table
from vita_audio.evaluation.speed import measure_speed
from vita_audio.evaluation.tasks import SpeechSynthesis, Task, published_options, run_recordings
from vita_audio.evaluation.tasks.task import Scores
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.files import write_json_lines
from vita_audio.inference import GenerationOptions, Schedule, SpeechPipeline

logger = logging.getLogger(__name__)

DECODINGS = ("greedy", "published")
RECORDINGS = "recordings"
"""Folder of the transcripts of the test sets' reference recordings."""


@dataclass(frozen=True)
class BenchmarkSet:
    """A test set and its task.

    Attributes:
        name: name of its result files, unique among the sets.
        recogniser: transcribes the speech; None if the task has no speech output.
    """

    name: str
    task: Task
    path: Path
    items: Sequence[BenchmarkItem]
    recogniser: TranscriberConfig | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of its content, its task and its recogniser."""
        heard_by = None if self.recogniser is None else self.recogniser.fingerprint()
        return fingerprint_of(repr(self.task), items_fingerprint(self.path, self.items), heard_by)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes that readers of its scores need."""
        notes = []
        foreign = sum(not self.task.is_as_trained(item) for item in self.items)
        if foreign:
            notes.append(
                f"{self.name}: {foreign} of {len(self.items)} prompts differ in wording from the training data "
                "(docs/data.md), so these scores say little about the model"
            )
        if self.recogniser is not None:
            notes.append(f"{self.name}: transcribed by {self.recogniser.describe()}")
        return tuple(notes)


@dataclass(frozen=True)
class Checkpoint:
    """A model in the table.

    Attributes:
        stage: its name in the table.
        modes: schedules to score, by name or as numbers.
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
        if decoding == "greedy":
            return GenerationOptions.greedy(mode, max_new_tokens=self.max_new_tokens)
        drawn = GenerationOptions(mode, max_new_tokens=self.max_new_tokens, seed=self.seed)
        return published_options(task, drawn)


def check(checkpoints: Sequence[Checkpoint], sets: Sequence[BenchmarkSet], settings: Settings) -> None:
    """Refuse settings that would fail later, before anything is loaded or written.

    Raises:
        ValueError: a recogniser cannot be opened, or two rows would share a folder.
    """
    for recogniser in dict.fromkeys(one.recogniser for one in sets if one.recogniser is not None):
        recogniser.check()
    folders = Counter(
        folder_name(checkpoint.stage, mode, decoding)
        for checkpoint in checkpoints
        for mode in checkpoint.modes
        for decoding in settings.decodings
    )
    twice = [folder for folder, count in folders.items() if count > 1]
    if twice:
        raise ValueError(f"two rows would be written to {twice[0]}; give each checkpoint and mode once")


def evaluate(
    checkpoints: Sequence[Checkpoint],
    sets: Sequence[BenchmarkSet],
    settings: Settings,
    output_dir: Path,
    open_pipeline: Callable[[Path], SpeechPipeline],
) -> list[Row]:
    """Score every checkpoint in every mode on every test set; write ``scores.json`` and ``scores.md``.

    All processes of a launch must call it. Call :func:`check` first.

    Raises:
        ValueError: a recogniser cannot be opened, or there is nothing to score.
    """
    for one in sets:
        for note in one.notes:
            if is_first():
                logger.info(note)
    rows: list[Row] = []
    with ExitStack() as stack:
        ears = _Ears(settings.transcriber_processes, stack)
        for checkpoint in checkpoints:
            gc.collect()  # free the old model before the next one is loaded
            scorer = _Scorer(checkpoint, sets, settings, output_dir, open_pipeline, ears)
            for mode in checkpoint.modes:
                for decoding in settings.decodings if settings.given is None else ("given",):
                    rows.append(scorer.row(mode, decoding))
                    if is_first():
                        write_table(output_dir, rows)
    return rows


class _Ears:
    """A pool for each recogniser, opened on first use."""

    def __init__(self, processes: int, stack: ExitStack) -> None:
        self._processes = processes
        self._stack = stack
        self._pools: dict[TranscriberConfig, TranscriberPool] = {}
        self._listeners: dict[TranscriberConfig, Listener] = {}

    def listener(self, recogniser: TranscriberConfig, pipeline: SpeechPipeline) -> Listener:
        """The listener for a recogniser. All checkpoints share the codec, so its transcripts are reused for all."""
        if recogniser not in self._listeners:
            pool = self._stack.enter_context(TranscriberPool(recogniser, self._processes))
            self._listeners[recogniser] = Listener(pipeline.codec, pool)
        return self._listeners[recogniser]


@dataclass
class _Scorer:
    """The rows of one checkpoint."""

    checkpoint: Checkpoint
    sets: Sequence[BenchmarkSet]
    settings: Settings
    output_dir: Path
    open_pipeline: Callable[[Path], SpeechPipeline]
    ears: _Ears

    @cached_property
    def pipeline(self) -> SpeechPipeline:
        return self.open_pipeline(self.checkpoint.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint, the codec and everything else that affects all replies."""
        settings = [self.settings.codec, self.settings.batch_size, self.settings.system_prompt]
        return fingerprint_of(checkpoint_fingerprint(self.checkpoint.folder), settings)

    def row(self, mode: str, decoding: str) -> Row:
        """Scores of all test sets in one mode."""
        row: Row = {
            "stage": self.checkpoint.stage,
            "mode": mode,
            "decoding": decoding,
            "schedule": Schedule.parse(mode).numbers,
            "checkpoint": str(self.checkpoint.folder),
            "sets": {},
            "notes": [],
        }
        tasks = [one.task.name for one in self.sets]
        for one in self.sets:
            scores = self._set_scores(one, mode, decoding)
            if isinstance(one.task, SpeechSynthesis) and self.settings.recordings:
                scores |= self._recordings(one, one.task)
            facts = {"task": one.task.name, "items": len(one.items)}
            facts |= {name: scores.pop(name) for name in ("system", "options")}
            row["sets"][one.name] = facts
            row["notes"] += [*one.notes, *self._notes(one, facts)]
            scores.pop("fingerprint")
            row |= set_keys(scores, one.name, alone=tasks.count(one.task.name) == 1)
        if decoding == "greedy":
            row |= self._speed(mode)
        return row

    def _set_scores(self, one: BenchmarkSet, mode: str, decoding: str) -> dict[str, Any]:
        options = self.settings.options(one.task, mode, decoding)
        folder = self._folder(mode, decoding)

        def compute() -> dict[str, Any]:
            system = self._system() if one.task.open_system else None
            bench = Bench(
                self.pipeline,
                folder,
                one.name,
                self._listener(one),
                options,
                self.settings.batch_size,
                system,
            )
            utterances = one.task.run(bench, one.items)
            write_utterances(folder / f"{one.name}.jsonl", utterances)
            return {**one.task.score(utterances), "system": system, "options": self._resolved(options)}

        return keep_scores(
            folder, one.name, fingerprint_of(self.fingerprint, one.fingerprint, repr(options)), compute
        )

    def _recordings(self, one: BenchmarkSet, task: SpeechSynthesis) -> dict[str, Any]:
        """Transcripts of a test set's reference recordings; independent of the model."""
        folder = self.output_dir / RECORDINGS

        def compute() -> Scores:
            bench = Bench(
                self.pipeline, folder, one.name, self._listener(one), batch_size=self.settings.batch_size
            )
            resynthesised, natural = run_recordings(bench, self.pipeline.codec, one.items)
            write_utterances(folder / f"{one.name}_resynthesised.jsonl", resynthesised)
            write_utterances(folder / f"{one.name}_natural.jsonl", natural)
            return task.score_recordings(resynthesised, natural)

        return keep_scores(folder, one.name, fingerprint_of(self.settings.codec, one.fingerprint), compute)

    def _speed(self, mode: str) -> Row:
        timed = next((one for one in self.sets if one.task.speaks), None)
        if timed is None or not self.settings.speed_items:
            return {}
        fingerprint = fingerprint_of(
            self.fingerprint, timed.fingerprint, self.settings.speed_items, self.settings.max_new_tokens
        )
        folder = self._folder(mode, "greedy")
        # No test set has this name: their names begin with a letter or a digit.
        scores = keep_scores(folder, "_speed", fingerprint, lambda: self._speeds.get(mode, {}))
        return {name: value for name, value in scores.items() if name != "fingerprint"}

    @cached_property
    def _speeds(self) -> dict[str, Scores]:
        """Speed of all modes, measured by the process that writes the table."""
        timed = next(one for one in self.sets if one.task.speaks)
        if not is_first():
            return {}
        system = self._system() if timed.task.open_system else None
        items = [
            replace(item, conversation=with_system(item.conversation, system))
            for item in timed.items[: self.settings.speed_items + 1]
        ]
        return measure_speed(
            self.pipeline, items, self.checkpoint.modes, max_new_tokens=self.settings.max_new_tokens
        )

    def _notes(self, one: BenchmarkSet, facts: Mapping[str, Any]) -> list[str]:
        notes = []
        if one.task.open_system:
            said = f"the system message {facts['system']!r}" if facts["system"] else "no system message"
            notes.append(f"{one.name}: questions without a system message were asked with {said}")
        options = facts["options"]
        if options["do_sample"] or options["repetition_penalty"] != 1.0:
            drawn = {name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}
            words = (
                [f"{name} {value}" for name, value in drawn.items()] if options["do_sample"] else ["greedy"]
            )
            words.append(f"repetition_penalty {options['repetition_penalty']}")
            notes.append(f"{one.name}: as published: {', '.join(words)}")
        return notes

    def _folder(self, mode: str, decoding: str) -> Path:
        if self.settings.single:
            return self.output_dir
        return self.output_dir / folder_name(self.checkpoint.stage, mode, decoding)

    def _listener(self, one: BenchmarkSet) -> Listener | None:
        return None if one.recogniser is None else self.ears.listener(one.recogniser, self.pipeline)

    def _system(self) -> str | None:
        return self.pipeline.system_message(self.settings.system_prompt)

    def _resolved(self, options: GenerationOptions) -> dict[str, Any]:
        model = self.pipeline.model
        return options.resolved(model.generation_config, model.config.num_nextn_predict_layers).to_dict()


def folder_name(stage: str, mode: str, decoding: str) -> str:
    """Folder of a row's result files."""
    return "-".join([stage, mode.replace(" ", "-"), *([decoding] if decoding != "greedy" else [])])


def write_utterances(path: Path, utterances: Sequence[Utterance]) -> None:
    """One JSON object per line; only the first process writes."""
    if is_first():
        write_json_lines(path, map(asdict, utterances))
