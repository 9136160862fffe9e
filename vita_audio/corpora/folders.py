"""Folders of recordings, as people keep their own: each form becomes utterances with the same ids, texts and clips.

=============  ====================================================================================================
beside         ``NAME.wav`` (or FLAC, MP3, …) with its transcript in ``NAME.txt``
table          a CSV or TSV with a header; also ``metadata.csv`` or ``metadata.jsonl`` of ``datasets`` (AudioFolder)
ljspeech       ``metadata.csv`` of ``ID|text|normalised text``, recordings in ``wavs/``
vctk           ``txt/SPEAKER/ID.txt``, recordings in ``wav48/`` or ``wav48_silence_trimmed/``
kaldi          ``wav.scp``, ``text``, and if there are ``segments`` and ``utt2spk``
subtitles      ``NAME.vtt`` or ``NAME.srt`` next to a long ``NAME.mp3``, cut at the cues
=============  ====================================================================================================
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vita_audio.audio.archives import file_exists
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Utterance
from vita_audio.corpora.layouts import Listed, SourceError, text_of, utterance
from vita_audio.corpora.tables import rows_of

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".wma", ".aiff", ".webm", ".mp4")
_AUDIO_COLUMNS = ("file_name", "audio", "path", "file", "wav", "filename", "audio_path", "audio_filepath")
_TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
_SPEAKER_COLUMNS = ("speaker", "speaker_id", "spk", "client_id")
_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{2})[.,](\d{3})"
_CUE = re.compile(rf"{_TIME}\s+-->\s+{_TIME}")


@dataclass(frozen=True, kw_only=True)
class Beside(Listed):
    """Recordings with text files of the same name."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        clips = {path.with_suffix("") for path in _recordings(folder)}
        for path in _recordings(folder):
            name, transcript = _name(folder, path), path.with_suffix(".txt")
            if transcript.is_file():
                yield _said(name, transcript, Clip(str(path)))
            else:
                yield Broken(name, Rejection.NO_TRANSCRIPT, f"{path}: there is no {transcript.name}")
        for path in sorted(folder.rglob("*.txt")):
            if path.with_suffix("") not in clips:
                yield Broken(
                    _name(folder, path), Rejection.NO_AUDIO, f"{path}: there is no recording of this name"
                )


@dataclass(frozen=True, kw_only=True)
class Table(Listed):
    """Tables that name a recording and its text in each row."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        for table in _tables(folder):
            for name, row in rows_of(table):
                yield row if isinstance(row, Broken) else _table_row(table, name, row)


@dataclass(frozen=True, kw_only=True)
class LJSpeech(Listed):
    """LJSpeech's layout; the normalised text is used where there is one."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        for number, line in enumerate(_read(folder / "metadata.csv").splitlines()):
            name, *texts = line.split("|")
            text = next((text for text in reversed(texts) if text.strip()), "")
            path = _recording(folder / "wavs", name)
            if path is None:
                yield Broken(
                    name or f"line-{number}", Rejection.NO_AUDIO, f"{folder}: there is no wavs/{name}.wav"
                )
            else:
                yield Utterance(name, text, Clip(str(path)))


@dataclass(frozen=True, kw_only=True)
class VCTK(Listed):
    """VCTK's layout; of two microphones the second is used, as lhotse does."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        for transcript in sorted((folder / "txt").rglob("*.txt")):
            name, speaker = transcript.stem, transcript.parent.name
            places = [folder / kind / speaker for kind in ("wav48_silence_trimmed", "wav48")]
            names = (f"{name}_mic2", f"{name}_mic1", name)
            found = next(
                (path for place in places for one in names if (path := _recording(place, one))), None
            )
            if found is None:
                yield Broken(name, Rejection.NO_AUDIO, f"{transcript}: there is no recording of this name")
            else:
                yield _said(name, transcript, Clip(str(found)), speaker)


@dataclass(frozen=True, kw_only=True)
class Kaldi(Listed):
    """A data folder of Kaldi. Commands in ``wav.scp`` (lines that end in ``|``) are not run."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        recordings = _mapping(folder / "wav.scp")
        texts, speakers = _mapping(folder / "text"), _mapping(folder / "utt2spk", needed=False)
        segments = _mapping(folder / "segments", needed=False) or {name: name for name in texts}
        for name, segment in segments.items():
            recording, *times = segment.split()
            path = recordings.get(recording)
            if path is None or path.endswith("|"):
                what = "is a command, which is not run" if path else "is not in wav.scp"
                yield Broken(name, Rejection.NO_AUDIO, f"{folder}: the recording {recording} {what}")
            elif name not in texts:
                yield Broken(name, Rejection.NO_TRANSCRIPT, f"{folder / 'text'}: no line for {name}")
            elif (part := _part(times)) is None:
                yield Broken(
                    name, Rejection.BAD_ROW, f"{folder / 'segments'}: {name} has no start before an end"
                )
            else:
                start, end = part
                audio = str(folder / path) if file_exists(folder / path) else path
                yield Utterance(name, texts[name], Clip(audio, start, end), speakers.get(name))


@dataclass(frozen=True, kw_only=True)
class Subtitles(Listed):
    """Long recordings with WebVTT or SRT subtitles of the same name; each cue is an utterance."""

    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        for path in sorted([*folder.rglob("*.vtt"), *folder.rglob("*.srt")]):
            recording = _recording(path.parent, path.name.split(".")[0]) or _recording(path.parent, path.stem)
            if recording is None:
                yield Broken(
                    _name(folder, path), Rejection.NO_AUDIO, f"{path}: there is no recording of this name"
                )
                continue
            try:
                subtitles = _read(path)
            except SourceError as error:
                yield Broken(_name(folder, path), Rejection.NO_TRANSCRIPT, str(error))
                continue
            for number, (start, end, text) in enumerate(cues(subtitles), 1):
                yield Utterance(f"{_name(folder, path)}-{number:05d}", text, Clip(str(recording), start, end))


FOLDERS: dict[str, type[Listed]] = {
    "kaldi": Kaldi,
    "vctk": VCTK,
    "ljspeech": LJSpeech,
    "subtitles": Subtitles,
    "table": Table,
    "beside": Beside,
}
"""The forms by name, the most specific first."""


def form_of(folder: Path) -> str:
    """The form of a folder.

    Raises:
        SourceError: it has none of them.
    """
    metadata = folder / "metadata.csv"
    if (folder / "wav.scp").is_file():
        return "kaldi"
    if (folder / "txt").is_dir() and any(folder.glob("wav48*")):
        return "vctk"
    if metadata.is_file() and (folder / "wavs").is_dir() and "file_name" not in _read(metadata)[:200]:
        return "ljspeech"
    if any(folder.rglob("*.vtt")) or any(folder.rglob("*.srt")):
        return "subtitles"
    if _tables(folder):
        return "table"
    if any(_recordings(folder)):
        return "beside"
    raise SourceError(f"{folder}: holds no recordings with transcripts; known forms: {', '.join(FOLDERS)}")


def cues(text: str) -> Iterator[tuple[float, float, str]]:
    """Start and end in seconds, and text, of the cues of a WebVTT or SRT file; tags and speaker names are removed."""
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        match = _CUE.search(block)
        if match is None:
            continue
        spoken = html.unescape(re.sub(r"<[^>]*>|\{\\[^}]*\}", "", block[match.end() :].partition("\n")[2]))
        yield _seconds(match.groups()[:4]), _seconds(match.groups()[4:]), " ".join(spoken.split())


def _seconds(fields: tuple[str | None, ...]) -> float:
    hours, minutes, seconds, thousandths = (int(field or 0) for field in fields)
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000


def _table_row(table: Path, name: str, row: Mapping[str, object]) -> Utterance | Broken:
    audio = _first(row, _AUDIO_COLUMNS)
    text = _first(row, _TEXT_COLUMNS)
    if audio is None or text is None:
        known = f"{' or '.join(_AUDIO_COLUMNS[:3])}, and {' or '.join(_TEXT_COLUMNS[:3])}"
        raise SourceError(f"{table}: needs columns {known}; it has {', '.join(map(str, row))}")
    path = Path(text_of(row[audio]))
    places = [table.parent / path, *(table.parent / folder / path for folder in ("clips", "wavs", "audio"))]
    found = next((place for place in places if path.name and file_exists(place)), None)
    id_ = path.stem or name
    if found is None:
        return Broken(id_, Rejection.NO_AUDIO, f"{table}: there is no recording {path}")
    speaker = _first(row, _SPEAKER_COLUMNS)
    return utterance(id_, row[text], Clip(str(found)), text_of(row[speaker]) or None if speaker else None)


def _first(row: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in row), None)


def _tables(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    metadata = sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")])
    return metadata or sorted([*folder.glob("*.csv"), *folder.glob("*.tsv")])


def _recordings(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            yield path


def _recording(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for suffix in AUDIO_SUFFIXES)
    return next((path for path in candidates if name and path.is_file()), None)


def _name(folder: Path, path: Path) -> str:
    """The id of a file: its path below the folder, without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix().replace("/", "-")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _said(name: str, transcript: Path, clip: Clip, speaker: str | None = None) -> Utterance | Broken:
    """A clip with the text of its own file; a file that is not text costs only its clip."""
    try:
        return Utterance(name, _read(transcript), clip, speaker)
    except SourceError as error:
        return Broken(name, Rejection.NO_TRANSCRIPT, str(error))


def _part(times: list[str]) -> tuple[float, float | None] | None:
    """Start and end of a segment; without times the whole recording, None if they are none."""
    if not times:
        return 0.0, None
    try:
        start, end = map(float, times)
    except ValueError:
        return None
    return (start, end) if 0 <= start < end < math.inf else None


def _mapping(path: Path, *, needed: bool = True) -> dict[str, str]:
    """Lines of ``NAME value`` of Kaldi."""
    if not needed and not path.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in _read(path).splitlines() if line.strip())
    return {name: (rest[0].strip() if rest else "") for name, *rest in pairs}
