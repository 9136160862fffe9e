"""Spoken questions and answers from those of a text set: how data like AudioQA is made.

A speaker (any text-to-speech command, or a model) reads every user turn in one of several voices and every assistant
turn in one voice. What cannot be read aloud (code, formulas, addresses, long texts) is rejected; the checks of every
corpus follow, and a recogniser can confirm that the speech says its text.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from vita_audio.chat import Sample, SampleError, parse_sample
from vita_audio.constants import AUDIO_TAG
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Dialogue, Item, Rejected
from vita_audio.corpora.layouts import Layout, blocks, matching
from vita_audio.corpora.recipes import Part, Recipe
from vita_audio.corpora.tables import rows_of
from vita_audio.files import read_json_lines

_BLOCK = 200
"""Conversations in a unit: some minutes of work for a synthesiser on a CPU."""
_COMMAND_SECONDS = 300
_UNSPEAKABLE = re.compile(
    r"```|`[^`]+`|https?://|\\[a-zA-Z]+|\$[^$]+\$|\|.*\||^\s*[-*] |[{}<>=^\\]", re.MULTILINE
)
_EMPHASIS = re.compile(r"[*_#]+")


class Speaker(Protocol):
    """Reads a text aloud."""

    def __call__(self, text: str, voice: str) -> bytes:
        """Content of an audio file.

        Raises:
            Rejected: this text cannot be spoken.
        """


@dataclass(frozen=True)
class CommandSpeaker:
    """A text-to-speech command, run once per text, without a shell.

    Attributes:
        command: with ``{text}`` and ``{out}``, the WAV file that it writes; ``{voice}`` where it has voices.
    """

    command: str

    def __post_init__(self) -> None:
        if not all(name in self.command for name in ("{text}", "{out}")):
            raise ValueError(f"{self.command!r}: a text-to-speech command needs {{text}} and {{out}}")
        program = shlex.split(self.command)[0]
        if shutil.which(program) is None:
            raise ValueError(f"{program}: no such program; install it or give another command")

    def open(self) -> Speaker:
        """The speaker itself: there is nothing to load."""
        return self

    def __call__(self, text: str, voice: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "speech.wav"
            values = {"{text}": text, "{out}": str(out), "{voice}": voice}
            words = [_filled(word, values) for word in shlex.split(self.command)]
            try:
                run = subprocess.run(words, capture_output=True, timeout=_COMMAND_SECONDS, check=False)
            except subprocess.TimeoutExpired as error:
                raise Rejected(
                    Rejection.NO_AUDIO, f"{words[0]} took over {_COMMAND_SECONDS} s: {text!r:.80}"
                ) from error
            if run.returncode or not out.is_file():
                said = run.stderr.decode(errors="replace").strip().splitlines()
                raise Rejected(
                    Rejection.NO_AUDIO, f"{words[0]} cannot speak {text!r:.80}: {said[-1:] or 'no file'}"
                )
            return out.read_bytes()


def _filled(word: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(?:text|out|voice)\}", lambda match: values[match[0]], word)


@dataclass(frozen=True)
class SpokenTexts(Layout):
    """Text samples, read aloud.

    Attributes:
        open_speaker: opens the speaker, once in each worker.
        voices: of user turns; one of them for each conversation, by its id.
        answer_voice: of assistant turns.
        max_characters: longer turns are rejected.
        answers: also speak the answers; else they stay text.
    """

    open_speaker: Callable[[], Speaker]
    voices: tuple[str, ...]
    answer_voice: str
    max_characters: int
    answers: bool

    def units(self, source: Path, patterns: Sequence[str], work: Path) -> list[Path]:
        """Blocks of conversations, so that several processes can speak one file."""

        def rows() -> Iterator[dict[str, Any]]:
            for file in matching(source, patterns):
                for name, row in rows_of(file):
                    yield {
                        "name": name,
                        **({"broken": row.message} if isinstance(row, Broken) else {"row": row}),
                    }

        return blocks(work, rows, _BLOCK)

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        speaker = _opened(self.open_speaker)
        for entry in read_json_lines(unit):
            name = entry["name"]
            if "broken" in entry:
                yield Broken(name, Rejection.BAD_ROW, entry["broken"])
                continue
            try:
                sample = parse_sample(entry["row"])
                name = sample.id or name
                yield self._spoken(name, sample, speaker)
            except (SampleError, Rejected) as error:
                yield Broken(name, error.reason, f"{name}: {error}")

    def _spoken(self, name: str, sample: Sample, speaker: Speaker) -> Dialogue:
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        voice = self.voices[int.from_bytes(digest, "little") % len(self.voices)]
        messages, clips, texts = [], [], []
        for message in sample.messages:
            text, content = message.text.strip(), message.content
            if message.num_audios:
                raise Rejected(Rejection.UNSPEAKABLE, "it has speech already")
            if message.role == "user" or (message.role == "assistant" and self.answers):
                said = speakable(text, self.max_characters)
                clips.append(Clip(speaker(said, voice if message.role == "user" else self.answer_voice)))
                texts.append(said)
                content = AUDIO_TAG if message.role == "user" else f"{text}\n{AUDIO_TAG}"
            messages.append({"role": message.role, "content": content})
        return Dialogue(name, messages, tuple(clips), tuple(texts))


@lru_cache(maxsize=1)
def _opened(open_speaker: Callable[[], Speaker]) -> Speaker:
    return open_speaker()


def speakable(text: str, max_characters: int) -> str:
    """A text as it is read aloud: without marks of emphasis.

    Raises:
        Rejected: it is too long, or has what nobody reads aloud.
    """
    if len(text) > max_characters:
        raise Rejected(Rejection.UNSPEAKABLE, f"{len(text)} characters, the most is {max_characters}")
    found = _UNSPEAKABLE.search(text)
    if found is not None:
        raise Rejected(Rejection.UNSPEAKABLE, f"{found[0]!r:.40} is not read aloud")
    return " ".join(_EMPHASIS.sub("", text).split())


def speaking_recipe(name: str, file: str) -> Recipe:
    """The recipe that writes ``NAME.jsonl`` below the data root from a file of text samples."""
    part = Part(f"{name}.jsonl", (file,), "spoken_texts", (), (), (), {})
    return Recipe(name, name, "", "", "", "text samples", (part,))
