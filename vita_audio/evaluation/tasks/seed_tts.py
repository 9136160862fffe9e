"""Seed-TTS: reads text aloud, optionally in the voice of a recording, and averages the utterances' error rates.

A test set is the benchmark's own ``meta.lst``: ``ID|TEXT OF THE PROMPT|PROMPT.WAV|TEXT TO READ``, one utterance per
line. An optional fifth field is the recording of the text. Paths are relative to the data root or to the file's
folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vita_audio.chat import default_data_root, locate_file, prompts
from vita_audio.evaluation.items import BenchmarkItem, every_nth, read_test_set, refuse_repeated_ids
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.metrics import seed_tts_error_rate, seed_tts_tokens, utterance_errors
from vita_audio.evaluation.normalisers import plain_words
from vita_audio.evaluation.statistics import Marks, rates
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances
from vita_audio.evaluation.tasks.tts import Reading, check_text, requested_text, sound_marks

LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class SeedTTS(Reading):
    """Seed-TTS in one language.

    Attributes:
        language: ``zh`` (errors per character) or ``en`` (errors per word).
        speaker_prompt: use the recording of each utterance's speaker as the voice prompt.
    """

    language: str
    speaker_prompt: bool = False
    name: str = "seed_tts"
    title: str = "Seed-TTS"
    columns: tuple[Column, ...] = (
        Column("mean WER %", "seed_tts_wer"),
        Column("as published %", "seed_tts_wer_answered"),
        Column("all words %", "seed_tts_wer_words"),
        Column("SIM", "seed_tts_similarity", ".3f", 1),
        Column("DNSMOS", "seed_tts_quality", ".2f", 1),
    )
    speaks: bool = True
    samples: bool = True
    open_system: bool = False

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        """Items of a ``meta.lst``, or of a :class:`~.tts.SpeechSynthesis` test set if the file is named ``*.json*``."""
        path = Path(path)
        if ".json" in path.name:
            return read_test_set(path, data_root, limit, check=self._check)
        items = self._read_list(path, data_root or default_data_root(path), limit)
        refuse_repeated_ids(items, path)
        return items

    def marks(self, utterance: Utterance) -> Marks:
        """``seed_tts_wer`` is the mean of the utterances' rates, one without speech counts as 1;
        ``seed_tts_wer_answered`` leaves it out, as published. ``seed_tts_wer_words`` divides all errors by all words,
        and takes hyphens as spaces."""
        reference, heard = str(utterance.reference), utterance.heard
        mean = 1.0 if heard is None else seed_tts_error_rate(reference, heard, self.language).rate
        spoken = None if heard is None else plain_words(heard)
        marks = {
            "seed_tts_wer": (mean, 1.0),
            "seed_tts_wer_words": utterance_errors(plain_words(reference), spoken),
        }
        if heard is not None:
            marks["seed_tts_wer_answered"] = (mean, 1.0)
        return marks | sound_marks("seed_tts", utterance)

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """The rates of :meth:`marks` as fractions, and the number of utterances behind them."""
        need_utterances(utterances)
        return {
            **rates([self.marks(utterance) for utterance in utterances]),
            "seed_tts_utterances": len(utterances),
            "seed_tts_without_audio": sum(utterance.heard is None for utterance in utterances),
        }

    def _read_list(self, path: Path, root: AnyPath, limit: int | None) -> list[BenchmarkItem]:
        if not path.is_file():
            raise ValueError(f"{path}: no such test set")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text: {error}") from error
        entries = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not entries:
            raise ValueError(f"{path}: holds no samples")
        items = []
        for number, line in every_nth(entries, limit, path):
            try:
                items.append(self._read_line(line, Path(root), path.parent))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        return items

    def _read_line(self, line: str, root: Path, beside: Path) -> BenchmarkItem:
        fields = [field.strip() for field in line.split("|")]
        if len(fields) not in (4, 5):
            raise ValueError(
                f"{len(fields)} fields; write ID|PROMPT TEXT|PROMPT WAV|TEXT, and no | inside a text"
            )
        name, _, prompt, text = fields[:4]
        voice = locate_file(prompt, root, beside) if self.speaker_prompt else None
        recording = locate_file(fields[4], root, beside) if len(fields) == 5 and fields[4] else None
        if not name:
            raise ValueError("the first field, the utterance's name, is empty")
        for audio in (voice, recording):
            if audio is not None and not Path(audio).is_file():
                raise ValueError(f"{audio}: no such audio file")
        item = BenchmarkItem(
            id=name,
            conversation=prompts.synthesis(text, voice),
            answer=text,
            answers=(text,),
            reference_audio=recording,
            voice=voice,
        )
        self._check(item)
        return item

    def _check(self, item: BenchmarkItem) -> None:
        check_text(item)
        if not seed_tts_tokens(requested_text(item), self.language):
            raise ValueError(f"the text {requested_text(item)!r} contains no words besides punctuation")


def language_of(path: Path, language: str | None) -> str:
    """The language of a ``meta.lst``: as given, else from its folder, as in the benchmark's layout.

    Raises:
        ValueError: neither determines it.
    """
    found = language or next((part for part in reversed(path.parts[:-1]) if part in LANGUAGES), None)
    if found not in LANGUAGES:
        raise ValueError(f"{path}: not in a folder named 'zh' or 'en'; give --seed_tts_language")
    return found
