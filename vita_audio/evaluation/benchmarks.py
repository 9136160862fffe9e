"""Benchmarks by name, from YAML files: the paper's in ``configs/benchmarks/``, and anybody's own in the same form.

A file maps names to entries. The keys of an entry:

==============  ====================================================================================================
task            ``asr``, ``tts``, ``seed_tts``, ``sqa`` (spoken questions) or ``text_qa`` (typed ones)
file            the test set, below the root; in a file of one's own also next to the YAML file
language        ``en``, ``zh``, …: for the recogniser, and for Seed-TTS
decoding        ``greedy`` (default) or ``published``
normaliser      of the texts that are compared (:data:`~vita_audio.evaluation.normalisers.NORMALISERS`)
recogniser      ``{name, path, grammar}``; the path is below the root, or a name in the local cache
speaker         ``{name, path}`` of the embedding that compares voices; without it they are not compared
speaker_prompt  for Seed-TTS: whether the speaker's recording is the voice prompt
published       rows of others: ``{model, source, scores: {score: fraction}}``
prepare         how ``tools/prepare_benchmark.py`` makes the file: ``page``, ``source`` (what SOURCE must hold),
                ``from`` (patterns below it), ``layout`` and its options (:mod:`vita_audio.corpora.layouts`)
==============  ====================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vita_audio.evaluation.items import PLAIN_NAME
from vita_audio.evaluation.normalisers import NORMALISERS, normaliser
from vita_audio.evaluation.scoreboard import TASKS
from vita_audio.evaluation.settings import DECODINGS
from vita_audio.evaluation.similarity import SpeakerConfig
from vita_audio.evaluation.tasks import SeedTTS, SpeechRecognition, SpeechSynthesis, Task
from vita_audio.evaluation.tasks.seed_tts import LANGUAGES
from vita_audio.evaluation.transcribers import TranscriberConfig
from vita_audio.strict_yaml import load_yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "benchmarks"
PAPER = "paper"
"""In a list of benchmarks: those of the paper that are there."""
_MODELS = "models/"


class BenchmarkError(ValueError):
    """A benchmark that does not exist or cannot be used. The message names the file, the benchmark and the field."""


@dataclass(frozen=True)
class Benchmark:
    """A test set with all that its score depends on. The attributes are the keys in the module's docstring."""

    name: str
    task: str
    file: str
    where: Path
    language: str | None = None
    decoding: str = "greedy"
    normaliser: str = "words"
    recogniser: Mapping[str, Any] = field(default_factory=dict)
    speaker: Mapping[str, Any] = field(default_factory=dict)
    speaker_prompt: bool = False
    published: Sequence[Mapping[str, Any]] = ()
    prepare: Mapping[str, Any] = field(default_factory=dict)

    def path(self, root: Path) -> Path:
        """Where its file is, or should be."""
        own = self.where.parent / self.file
        return own if self.where.parent != FOLDER and own.is_file() else root / self.file

    def make_task(self) -> Task:
        """
        Raises:
            ValueError: its normaliser's package is not installed.
        """
        if self.task == "seed_tts":
            return SeedTTS(str(self.language), self.speaker_prompt)
        if self.task in ("tts", "asr"):
            normaliser(self.normaliser)  # fails here if its package is missing
            return (SpeechSynthesis if self.task == "tts" else SpeechRecognition)(self.normaliser)
        return TASKS[self.task]

    def make_recogniser(self, root: Path) -> TranscriberConfig | None:
        """Its recogniser; None if nothing is heard. Without one of its own, pocketsphinx."""
        if not TASKS[self.task].speaks:
            return None
        settings = {"language": self.language, **self.recogniser}
        for key in ("path", "grammar"):
            if settings.get(key) is not None:
                settings[key] = self._found(str(settings[key]), root)
        if settings.get("path") and not Path(settings["path"]).exists():
            # Not below the root: Whisper may be in the local cache, the others have a name of their own.
            is_cached_name = settings.get("name") == "whisper" and settings["path"].startswith(_MODELS)
            settings["path"] = settings["path"].removeprefix(_MODELS) if is_cached_name else None
        return TranscriberConfig(**settings)

    def make_speaker(self, root: Path) -> SpeakerConfig | None:
        """The embedding that compares voices; None: they are not compared."""
        if not self.speaker:
            return None
        path = self.speaker.get("path")
        return SpeakerConfig(str(self.speaker["name"]), None if path is None else str(root / path))

    def preparation(self, root: Path) -> str:
        """The command that makes its file."""
        if not self.prepare:
            return f"{self.name}: {self.path(root)} is missing"
        return (
            f"{self.name}: {self.path(root)} is missing; get {self.prepare['page']} and run "
            f"tools/prepare_benchmark.py {self.name} SOURCE --root {root}"
        )

    def _found(self, path: str, root: Path) -> str:
        """A path below the root or next to the YAML file; unchanged if it is not there."""
        for base in (root, self.where.parent):
            if (base / path).exists():
                return str(base / path)
        return path


def read_benchmarks(file: Path) -> dict[str, Benchmark]:
    """The benchmarks of a YAML file, by name.

    Raises:
        BenchmarkError: the file cannot be read, or an entry is invalid.
    """
    try:
        content = load_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BenchmarkError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping) or not content:
        raise BenchmarkError(f"{file}: must map names of benchmarks to entries")
    return {str(name): _read(file, str(name), entry) for name, entry in content.items()}


def published_benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of the paper, by name.

    Raises:
        BenchmarkError: the folder ``configs/benchmarks`` holds none.
    """
    found: dict[str, Benchmark] = {}
    for file in sorted(FOLDER.glob("*.yaml")):
        found |= read_benchmarks(file)
    if not found:
        raise BenchmarkError(f"{FOLDER}: holds no benchmarks (*.yaml)")
    return found


def choose(names: Sequence[str], root: Path) -> tuple[list[Benchmark], list[str]]:
    """The benchmarks of a list, and what is missing.

    Args:
        names: ``paper`` (those that are there), names of the paper's benchmarks, and YAML files, which count as
            all of their entries.

    Returns:
        The benchmarks whose file is there, and a line for each other one of ``paper``.

    Raises:
        BenchmarkError: a name is unknown, or what was named one by one is missing.
    """
    chosen: dict[str, Benchmark] = {}
    missing: list[str] = []
    for name in names:
        known = published_benchmarks()
        if name == PAPER:
            missing = [one.preparation(root) for one in known.values() if not one.path(root).is_file()]
            chosen |= {key: one for key, one in known.items() if one.path(root).is_file()}
            continue
        if name.endswith((".yaml", ".yml")):
            named = read_benchmarks(Path(name))
        elif name in known:
            named = {name: known[name]}
        else:
            raise BenchmarkError(
                f"{name}: no such benchmark; give a YAML file, {PAPER}, or of {', '.join(known)}"
            )
        for one in named.values():
            if not one.path(root).is_file():
                raise BenchmarkError(one.preparation(root))
        chosen |= named
    return list(chosen.values()), missing


def _read(file: Path, name: str, entry: Any) -> Benchmark:
    where = f"{file}: {name}"
    if not isinstance(entry, Mapping):
        raise BenchmarkError(f"{where}: must be a mapping with 'task' and 'file'")
    if not PLAIN_NAME.fullmatch(name):
        raise BenchmarkError(f"{where}: a name has up to 64 letters, digits, '-', '_' and '.'")
    known = set(Benchmark.__dataclass_fields__) - {"name", "where"}
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise BenchmarkError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
    for key in ("task", "file"):
        if not isinstance(entry.get(key), str):
            raise BenchmarkError(f"{where}: needs a text for {key!r}")
    for key in ("recogniser", "speaker", "prepare"):
        if not isinstance(entry.get(key, {}), Mapping):
            raise BenchmarkError(f"{where}: {key!r} must be a mapping")
    for key, choices in (("task", TASKS), ("decoding", DECODINGS), ("normaliser", NORMALISERS)):
        if key in entry and entry[key] not in choices:
            raise BenchmarkError(f"{where}: {key!r} must be of {', '.join(choices)}; it is {entry[key]!r}")
    if entry["task"] == "seed_tts" and entry.get("language") not in LANGUAGES:
        raise BenchmarkError(f"{where}: 'language' must be of {', '.join(LANGUAGES)}")
    if "prepare" in entry and not {"page", "source", "from", "layout"} <= entry["prepare"].keys():
        raise BenchmarkError(f"{where}: 'prepare' needs page, source, from and layout")
    for key, holder in (("recogniser", TranscriberConfig), ("speaker", SpeakerConfig)):
        odd = [one for one in entry.get(key, {}) if one not in holder.__dataclass_fields__]
        if odd:
            raise BenchmarkError(f"{where}: {key!r} has an unknown key {odd[0]!r}")
    published = entry.get("published", ())
    if not all(isinstance(row, Mapping) and {"model", "source", "scores"} <= row.keys() for row in published):
        raise BenchmarkError(f"{where}: each row of 'published' needs model, source and scores")
    return Benchmark(name=name, where=file.resolve(), **entry)
