"""What a layout reads from a corpus: utterances, conversations, and members that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vita_audio.chat.sample import Reason


@dataclass(frozen=True)
class Clip:
    """A recording, or a part of one.

    Attributes:
        audio: path of an audio file or of a member of an archive, or the content of one.
        start, end: the part, in seconds; an end of None is the end of the recording.
        suffix: of the file that held the content, such as ``".mp3"``.
        row: path of the content in a Parquet file (:mod:`vita_audio.audio.archives`); empty: it has none.
    """

    audio: str | bytes
    start: float = 0.0
    end: float | None = None
    suffix: str = ""
    row: str = ""

    @property
    def is_whole_file(self) -> bool:
        return isinstance(self.audio, str) and self.start == 0 and self.end is None


@dataclass(frozen=True)
class Utterance:
    """Speech and its transcript.

    Attributes:
        id: unique in its corpus.
        speaker: utterances of one speaker can be voice prompts of each other; None: unknown.
    """

    id: str
    text: str
    clip: Clip
    speaker: str | None = None


@dataclass(frozen=True)
class Dialogue:
    """A conversation.

    Attributes:
        messages: ``{role, content}`` (or ``{from, value}``), with one ``<|audio|>`` for each clip.
        texts: what each clip says; None: unknown.
        answers: accepted answers of a question; empty: only the last message's.
    """

    id: str
    messages: Sequence[Mapping[str, str]]
    clips: tuple[Clip, ...] = ()
    texts: tuple[str | None, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A member that cannot be read.

    Attributes:
        reason: see :class:`vita_audio.corpora.cleaning.Rejection`.
        message: one line: the member, the fault.
    """

    id: str
    reason: str
    message: str


Item = Utterance | Dialogue | Broken


class Rejected(ValueError):
    """An item that does not become a sample.

    Attributes:
        reason: see :class:`vita_audio.corpora.cleaning.Rejection`.
    """

    def __init__(self, reason: Reason | str, message: str):
        super().__init__(message)
        self.reason = str(reason)
