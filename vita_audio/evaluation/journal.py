"""Utterances on disk as they are made, so a killed evaluation goes on where it was.

Every process appends to its own hidden file, ``.SET.FINGERPRINT.RANK.jsonl``, next to the results. The fingerprint
covers everything that affects an utterance, so utterances of other weights or test sets are never taken up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from vita_audio.distributed import gather_objects, rank


@dataclass(frozen=True)
class Utterance:
    """One reply, a line of the result files.

    Attributes:
        reference: expected text or answers.
        text: the model's text.
        heard: the transcript of the model's speech; None if there was no speech.
        wav: file of the speech, relative to the result file.
        similarity: cosine similarity of the speech's voice to the requested one; None if it was not measured.
        quality: how natural the speech sounds, 1 to 5; None if it was not measured.
        failure: why there is no reply; the utterance is then counted, but not scored.
    """

    id: str
    reference: str | list[str]
    text: str
    heard: str | None = None
    wav: str | None = None
    similarity: float | None = None
    quality: float | None = None
    failure: str | None = None


class Journal:
    """The utterances of a test set that were finished, in this run or an earlier one. A context manager.

    All processes of a launch must open it together.

    Args:
        folder: folder of the result files.
        name: name of the test set.
        fingerprint: of everything that affects the utterances; None: nothing is kept.
    """

    def __init__(self, folder: Path, name: str, fingerprint: str | None) -> None:
        self._pattern = f".{name}.{fingerprint}.*.jsonl"
        self._path = folder / self._pattern.replace("*", str(rank()))
        self._folder = folder if fingerprint is not None else None
        self._file: IO[str] | None = None
        mine = list(self._read())
        self.finished = {one.id: one for share in gather_objects(mine) for one in share}

    def __enter__(self) -> Journal:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that a killed process left unfinished
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, utterance: Utterance) -> None:
        """Keep an utterance. Failed ones are not kept, so another start tries them again."""
        if self._file is not None and utterance.failure is None:
            self._file.write(json.dumps(asdict(utterance)) + "\n")
            self._file.flush()

    def _read(self) -> Iterator[Utterance]:
        if self._folder is None:
            return
        for path in sorted(self._folder.glob(self._pattern)):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    yield Utterance(**json.loads(line))
                except (ValueError, TypeError):  # blank, or cut off in the middle
                    continue


def remove_journals(folder: Path, name: str) -> None:
    """Delete the journals of a test set, whose utterances are in its result file."""
    for path in folder.glob(f".{name}.*.jsonl"):
        path.unlink(missing_ok=True)
