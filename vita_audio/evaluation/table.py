"""The score table: one row per checkpoint and generation mode, written after every row.

A row is skipped when it is already in ``scores.json`` and nothing behind it has changed
(weights, test sets, limits, recogniser), so an interrupted evaluation continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vita_audio import distributed
from vita_audio.audio import AudioTokenizer
from vita_audio.evaluation.asr import run_asr, score_asr
from vita_audio.evaluation.benchmark import (
    SPOKEN_REPLY_TOKENS,
    BenchmarkItem,
    Listener,
    write_utterances,
)
from vita_audio.evaluation.sqa import run_sqa, score_sqa
from vita_audio.evaluation.tts import run_codec_floor, run_tts, score_codec_floor, score_tts
from vita_audio.files import write_json, write_text
from vita_audio.inference import AudioChunk, GenerationOptions, Schedule, SpeechPipeline, Timings

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkSets:
    """The items of each benchmark; an empty one is left out of the table."""

    asr: Sequence[BenchmarkItem] = ()
    tts: Sequence[BenchmarkItem] = ()
    sqa: Sequence[BenchmarkItem] = ()


@dataclass
class Table:
    """Rows of ``folder/scores.json`` and ``folder/scores.md``.

    Attributes:
        settings: whatever else decides the scores (test sets, limits, recogniser).
    """

    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Table:
        """Continue the table in ``folder``, or begin one.

        Raises:
            ValueError: ``scores.json`` is damaged.
        """
        path = folder / "scores.json"
        if not path.is_file():
            return cls(folder, settings)
        try:
            return cls(folder, settings, json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}; delete it to score again") from error

    def fingerprint(self, checkpoint: Path) -> str:
        """Changes when the weights or the settings do."""
        files = sorted(path for path in checkpoint.glob("*.safetensors"))
        state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        text = json.dumps([str(checkpoint), state, dict(self.settings)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def find(self, stage: str, mode: str, fingerprint: str) -> Row | None:
        """The row, if it is there and still holds."""
        return next(
            (
                row
                for row in self.rows
                if (row["stage"], row["mode"], row["fingerprint"]) == (stage, mode, fingerprint)
            ),
            None,
        )

    def put(self, row: Row) -> None:
        """Add a row, replacing an outdated one, and write both files."""
        key = (row["stage"], row["mode"])
        places = [index for index, old in enumerate(self.rows) if (old["stage"], old["mode"]) == key]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.write()

    def keep_only(self, keys: Sequence[tuple[str, str]]) -> None:
        """Drop the rows that are not asked for, and put the others in this order."""
        known = {(row["stage"], row["mode"]): row for row in self.rows}
        self.rows = [known[key] for key in keys if key in known]

    def write(self) -> None:
        if distributed.is_first():
            write_json(self.folder / "scores.json", self.rows)
            write_text(self.folder / "scores.md", markdown(self.rows))


def score_row(
    pipeline: SpeechPipeline,
    sets: BenchmarkSets,
    listener: Listener,
    folder: Path,
    stage: str,
    mode: str,
    *,
    batch_size: int = 32,
    max_new_tokens: int = SPOKEN_REPLY_TOKENS,
) -> Row:
    """What one checkpoint gets right in one mode; utterances and WAV files go to ``folder``.

    Speech-QA and ASR decode greedily; so does TTS, so that a row can be repeated.
    """
    options = GenerationOptions.greedy(mode, max_new_tokens=max_new_tokens)
    row: Row = {"stage": stage, "mode": mode, "schedule": Schedule.parse(mode).numbers}
    if sets.asr:
        asr = run_asr(pipeline, sets.asr, options, batch_size)
        write_utterances(folder / "asr.jsonl", asr)
        row |= score_asr(asr)
    if sets.tts:
        tts = run_tts(pipeline, sets.tts, options, listener, folder, batch_size)
        write_utterances(folder / "tts.jsonl", tts)
        row |= score_tts(tts)
    if sets.sqa:
        sqa = run_sqa(pipeline, sets.sqa, options, listener, folder, batch_size)
        write_utterances(folder / "sqa.jsonl", sqa)
        row |= score_sqa(sqa)
    return row


def measure_speed(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    modes: Sequence[str],
    *,
    max_new_tokens: int = SPOKEN_REPLY_TOKENS,
) -> dict[str, Row]:
    """Speed of one reply at a time, every mode in turn on each item, so that modes can be compared.

    The first item warms up and does not count, unless it is the only one.

    Returns:
        For each mode, medians over the replies: ``tokens_per_second`` of generation; ``first_chunk_seconds``
        from the finished prompt to the last code of the first audio chunk; ``first_sound_seconds``
        from the question to the first decoded samples, prompt and decoder included.
    """
    options = {mode: GenerationOptions.greedy(mode, max_new_tokens=max_new_tokens) for mode in modes}
    warm_up, *measured = items if len(items) > 1 else [*items, *items]
    for mode in modes:
        pipeline.reply(warm_up.conversation, options[mode], decode=False)
    timings: dict[str, list[Timings]] = {mode: [] for mode in modes}
    sounds: dict[str, list[float | None]] = {mode: [] for mode in modes}
    for item in measured:
        for mode in modes:
            timings[mode].append(pipeline.reply(item.conversation, options[mode], decode=False).timings)
            sounds[mode].append(first_sound_seconds(pipeline, item, options[mode]))
    return {mode: _speed_columns(timings[mode], sounds[mode]) for mode in modes}


def _speed_columns(timings: Sequence[Timings], sounds: Sequence[float | None]) -> Row:
    chunks = [timing.first_chunk - timing.prompt for timing in timings if timing.first_chunk is not None]
    heard = [seconds for seconds in sounds if seconds is not None]
    return {
        "tokens_per_second": median(
            timing.new_tokens / (timing.generated - timing.prompt) for timing in timings
        ),
        "first_chunk_seconds": median(chunks) if chunks else None,
        "first_sound_seconds": median(heard) if heard else None,
        "speed_utterances": len(timings),
    }


def first_sound_seconds(
    pipeline: SpeechPipeline, item: BenchmarkItem, options: GenerationOptions
) -> float | None:
    """Streams a reply until its first samples; None if it has none."""
    events = pipeline.stream(item.conversation, options)
    try:
        return next(
            (event.seconds for event in events if isinstance(event, AudioChunk) and len(event.samples)), None
        )
    finally:
        events.close()


def score_floor(
    codec: AudioTokenizer, items: Sequence[BenchmarkItem], listener: Listener, folder: Path, settings: Any
) -> dict[str, float | None]:
    """The codec's floor, kept in ``folder/floor.json`` for the next run with the same settings."""
    path = folder / "floor.json"
    key = json.loads(json.dumps({"codec": codec.fingerprint, "settings": settings}, default=str))
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return stored["scores"]
    resynthesised, natural = run_codec_floor(codec, items, listener, folder)
    write_utterances(folder / "floor.jsonl", resynthesised)
    write_utterances(folder / "natural.jsonl", natural)
    scores = score_codec_floor(resynthesised, natural)
    if distributed.is_first():
        write_json(path, {"key": key, "scores": scores})
    return scores


def markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown, with what its columns mean."""
    lines = [
        "| " + " | ".join(column.title for column in COLUMNS) + " |",
        "|" + "|".join("---" if column.is_text else "---:" for column in COLUMNS) + "|",
    ]
    lines += ["| " + " | ".join(column.cell(row) for column in COLUMNS) + " |" for row in rows]
    return "\n".join([*lines, "", LEGEND, ""])


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        key: of a row.
        form: how a number is written, after multiplication by ``scale``; empty for text.
    """

    title: str
    key: str
    form: str = ".1f"
    scale: float = 100

    @property
    def is_text(self) -> bool:
        return not self.form

    def cell(self, row: Row) -> str:
        """The row's value as people read it; a dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "–"
        return str(value) if self.is_text else format(self.scale * value, self.form)


COLUMNS = (
    Column("stage", "stage", ""),
    Column("mode", "mode", ""),
    Column("ASR WER %", "asr_wer"),
    Column("TTS WER %", "tts_wer"),
    Column("codec floor %", "tts_floor_wer"),
    Column("SQA S→T %", "sqa_s2t_accuracy"),
    Column("SQA S→S %", "sqa_s2s_accuracy"),
    Column("S→T whole words %", "sqa_s2t_accuracy_whole_words"),
    Column("S→S whole words %", "sqa_s2s_accuracy_whole_words"),
    Column("tokens/s", "tokens_per_second", ".0f", 1),
    Column("first chunk ms", "first_chunk_seconds", ".0f", 1000),
    Column("first sound ms", "first_sound_seconds", ".0f", 1000),
)
LEGEND = (
    "ASR: the model's text. TTS: what the recogniser hears in the model's speech; the codec floor is what it "
    "hears in the reference recordings after encoding and decoding. Replies without speech count as wholly "
    "wrong. SQA: the answer occurs in the text (S→T) or is heard in the speech (S→S), as the published rule "
    "counts, and by whole words. Speed: one reply at a time after a warm-up; first chunk: from the finished "
    "prompt to the codes of the first audio chunk; first sound: from the question to the first samples."
)
