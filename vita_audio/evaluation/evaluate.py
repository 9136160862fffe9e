"""Scores checkpoints, in several modes, on test sets.

Every test set is scored separately, in ``OUTPUT_DIR/STAGE-MODE/``: its utterances, their WAV files and its scores.
Valid earlier scores (:mod:`~vita_audio.evaluation.results`) are not computed again, and a checkpoint is loaded
only if one of its scores is missing.
"""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vita_audio.distributed import is_first
from vita_audio.evaluation.bench import Bench, with_system
from vita_audio.evaluation.journal import Utterance, remove_journals
from vita_audio.evaluation.listening import Listener
from vita_audio.evaluation.modes import mode_fields
from vita_audio.evaluation.quality import Dnsmos
from vita_audio.evaluation.results import checkpoint_fingerprint, fingerprint_of, keep_scores
from vita_audio.evaluation.scoreboard import Row, set_keys, write_table
from vita_audio.evaluation.settings import BenchmarkSet, Checkpoint, Settings, check, folder_name
from vita_audio.evaluation.similarity import SpeakerConfig, SpeakerEncoder
from vita_audio.evaluation.speed import measure_speed
from vita_audio.evaluation.statistics import Mark, Marks, intervals, rates
from vita_audio.evaluation.tasks import SpeechSynthesis, Task, run_recordings
from vita_audio.evaluation.tasks.task import Scores
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool
from vita_audio.files import write_json_lines
from vita_audio.inference import GenerationOptions, Schedule, SpeechPipeline
from vita_audio.provenance import git_revision, versions

__all__ = ["BenchmarkSet", "Checkpoint", "Settings", "check", "evaluate"]

logger = logging.getLogger(__name__)

RECORDINGS = "recordings"
"""Folder of the transcripts of the test sets' reference recordings."""
_FACTS = ("system", "options", "runs", "failed", "failures", "intervals", "spread")
"""What :meth:`_Scorer._set_scores` stores beside the scores."""


def evaluate(
    checkpoints: Sequence[Checkpoint],
    sets: Sequence[BenchmarkSet],
    settings: Settings,
    output_dir: Path,
    open_pipeline: Callable[[Path], SpeechPipeline],
) -> list[Row]:
    """Score every checkpoint in every mode on every test set; write ``results.json`` and ``results.md``.

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
                    row = scorer.row(mode, decoding)
                    if not row["sets"]:
                        continue
                    rows.append(row)
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
        self._speakers: dict[SpeakerConfig, SpeakerEncoder] = {}

    def listener(self, recogniser: TranscriberConfig, pipeline: SpeechPipeline) -> Listener:
        """The listener for a recogniser. All checkpoints share the codec, so its transcripts are reused for all."""
        if recogniser not in self._listeners:
            pool = self._stack.enter_context(TranscriberPool(recogniser, self._processes))
            self._listeners[recogniser] = Listener(pipeline.codec, pool)
        return self._listeners[recogniser]

    @cached_property
    def quality(self) -> Dnsmos:
        """The network that judges how natural speech sounds."""
        return Dnsmos()

    def speaker(self, config: SpeakerConfig) -> SpeakerEncoder:
        """The encoder for a speaker embedding."""
        if config not in self._speakers:
            self._speakers[config] = config.open()
        return self._speakers[config]


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
        return fingerprint_of(self.weights, settings)

    @cached_property
    def weights(self) -> str:
        return checkpoint_fingerprint(self.checkpoint.folder)

    def row(self, mode: str, decoding: str) -> Row:
        """Scores of all test sets in one mode."""
        row: Row = {
            "stage": self.checkpoint.stage,
            "mode": mode,
            "decoding": decoding,
            "schedule": Schedule.parse(mode_fields(mode)["mode"]).numbers,
            "checkpoint": str(self.checkpoint.folder),
            "weights": self.weights,
            "codec": dict(self.settings.codec),
            "git": git_revision(),
            "versions": versions(),
            "sets": {},
            "notes": [],
        }
        sets = [one for one in self.sets if one.decoding in (None, decoding) or decoding == "given"]
        tasks = [one.task.name for one in self.sets]
        for one in sets:
            scores = self._set_scores(one, mode, decoding)
            if isinstance(one.task, SpeechSynthesis) and self.settings.recordings:
                scores |= self._recordings(one, one.task)
            folder = self._folder(mode, decoding).relative_to(self.output_dir).as_posix()
            facts = {**one.facts, "folder": folder}
            facts |= {name: scores.pop(name) for name in _FACTS}
            row["sets"][one.name] = facts
            row["notes"] += [*one.notes, *self._notes(one, facts)]
            scores.pop("fingerprint")
            row |= set_keys(scores, one.name, alone=tasks.count(one.task.name) == 1)
        if self.settings.given is None and decoding == self.settings.decodings[0]:
            row |= self._speed(mode, decoding)
        return row

    def _set_scores(self, one: BenchmarkSet, mode: str, decoding: str) -> dict[str, Any]:
        options = self.settings.options(one.task, mode, decoding)
        folder = self._folder(mode, decoding)
        runs = self.settings.samples if options.do_sample is not False else 1
        fingerprint = fingerprint_of(self.fingerprint, one.fingerprint, repr(options), runs)

        def compute() -> dict[str, Any]:
            system = self._system() if one.task.open_system else None
            drawn = []
            for run in range(runs):
                bench = Bench(
                    self.pipeline,
                    folder,
                    one.name if run == 0 else f"{one.name}_sample{run + 1}",
                    self._listener(one),
                    # Items of one run draw from consecutive seeds.
                    options
                    if options.seed is None
                    else replace(options, seed=options.seed + run * len(one.items)),
                    self.settings.batch_size,
                    system,
                    None if one.speaker is None else self.ears.speaker(one.speaker),
                    None if one.quality is None else self.ears.quality,
                    fingerprint,
                )
                drawn.append(one.task.run(bench, one.items))
                write_utterances(folder / f"{bench.name}.jsonl", one.task, drawn[-1])
            return summarise(one.task, drawn) | {
                "system": system,
                "options": self._resolved(options),
                "runs": runs,
            }

        scores = keep_scores(folder, one.name, fingerprint, compute)
        if is_first() and not scores["failed"]:
            for run in range(runs):
                remove_journals(folder, one.name if run == 0 else f"{one.name}_sample{run + 1}")
        return scores

    def _recordings(self, one: BenchmarkSet, task: SpeechSynthesis) -> dict[str, Any]:
        """Transcripts of a test set's reference recordings; independent of the model."""
        folder = self.output_dir / RECORDINGS
        fingerprint = fingerprint_of(self.settings.codec, one.fingerprint)

        def compute() -> Scores:
            bench = Bench(
                self.pipeline,
                folder,
                one.name,
                self._listener(one),
                batch_size=self.settings.batch_size,
                fingerprint=fingerprint,
            )
            spoken = run_recordings(bench, self.pipeline.codec, one.items)
            for kind, utterances in zip(("resynthesised", "natural"), spoken, strict=True):
                write_utterances(folder / f"{one.name}_{kind}.jsonl", task, utterances)
            # Each recording is scored in both forms or in neither.
            failed = {utterance.id for heard in spoken for utterance in heard if utterance.failure}
            resynthesised, natural = ([one for one in heard if one.id not in failed] for heard in spoken)
            return task.score_recordings(resynthesised, natural)

        scores = keep_scores(folder, one.name, fingerprint, compute)
        if is_first():
            for kind in ("resynthesised", "natural"):
                remove_journals(folder, f"{one.name}_{kind}")
        return scores

    def _speed(self, mode: str, decoding: str) -> Row:
        timed = next((one for one in self.sets if one.task.speaks), None)
        if timed is None or not self.settings.speed_items:
            return {}
        fingerprint = fingerprint_of(
            self.fingerprint, timed.fingerprint, self.settings.speed_items, self.settings.max_new_tokens
        )
        folder = self._folder(mode, decoding)
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
        if facts["runs"] > 1:
            notes.append(f"{one.name}: means of {facts['runs']} draws")
        if facts["failed"]:
            notes.append(f"{one.name}: {facts['failed']} of {len(one.items)} items failed and are not scored")
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


def summarise(task: Task, drawn: Sequence[Sequence[Utterance]]) -> dict[str, Any]:
    """Scores of the utterances that did not fail, with intervals; over several draws means and their spread."""
    scored = [[utterance for utterance in run if utterance.failure is None] for run in drawn]
    failures = {
        utterance.id: utterance.failure for run in drawn for utterance in run if utterance.failure is not None
    }
    marks: dict[str, dict[str, Mark]] = {}
    for run in scored:
        for utterance in run:
            total = marks.setdefault(utterance.id, {})
            for key, (above, below) in task.marks(utterance).items():
                before = total.get(key, (0.0, 0.0))
                total[key] = (before[0] + above, before[1] + below)
    scores: dict[str, Any] = task.score(scored[0]) if scored[0] else {}
    if len(scored) > 1:
        scores |= rates(list(marks.values()))
    each = [rates([task.marks(utterance) for utterance in run]) for run in scored]
    values = {key: [value for one in each if (value := one.get(key)) is not None] for key in scores}
    spread = {key: statistics.stdev(found) for key, found in values.items() if len(found) > 1}
    return {
        **scores,
        "failed": len(failures),
        "failures": failures,
        "intervals": intervals(list(marks.values())),
        "spread": spread,
    }


def write_utterances(path: Path, task: Task, utterances: Sequence[Utterance]) -> None:
    """One JSON object per line, with the marks that the scores are made of; only the first process writes."""
    if is_first():
        write_json_lines(path, (_line(task, utterance) for utterance in utterances))


def _line(task: Task, utterance: Utterance) -> dict[str, Any]:
    marks: Marks = task.marks(utterance) if utterance.failure is None else {}
    return {**asdict(utterance), "marks": marks}
