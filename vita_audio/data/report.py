"""Bookkeeping of samples: counters, the error file, and the decision to stop.

Workers count. The counts are attached to the batches, so they describe the data that the trainer has received,
and a resumed run continues them from its checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vita_audio.chat.sample import Reason

logger = logging.getLogger(__name__)

ERROR_FILE = "data_errors.jsonl"
_TOO_LONG = frozenset({Reason.TOO_LONG.value, Reason.AUDIO_TOO_LONG.value})
"""A good mix may contain samples that are longer than a row. They are counted, and stop a run only if a file
contains nothing else."""
_SAMPLES_BEFORE_JUDGEMENT = 500
_BAD_ROWS_OF_A_USELESS_FILE = 64
"""A file with this many bad rows and no usable one counts as useless."""


class TooManyBadSamples(RuntimeError):
    """More samples are unusable than the run allows. The message is the summary."""


@dataclass
class Report:
    """Counts over a period.

    Attributes:
        used: documents by source.
        skipped: samples by (source, reason).
        speech: origin of the codes (see :class:`vita_audio.data.speech.SpeechReader`).
        tokens: in the rows that were handed out, without padding.
        positions: in the same rows, with padding.
        errors: one object per skipped sample, for the error file.
        useful_files: files that yielded a document.
        position: the last stream position that was read.
        fault: the machine fault that ended the work, if any.
    """

    used: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    speech: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    positions: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    useful_files: set[str] = field(default_factory=set)
    position: int = 0
    fault: str | None = None

    def add(self, other: Report) -> None:
        """Add another report's counts (not its error objects)."""
        self.used.update(other.used)
        self.skipped.update(other.skipped)
        self.speech.update(other.speech)
        self.tokens += other.tokens
        self.positions += other.positions
        self.position = max(self.position, other.position)

    @property
    def seen(self) -> int:
        """Samples read, used or skipped."""
        return self.used.total() + self.skipped.total()

    @property
    def bad(self) -> int:
        """Skipped samples that should not be in a mix: all except those that are too long."""
        return sum(count for (_, reason), count in self.skipped.items() if reason not in _TOO_LONG)

    def check(self, max_error_share: float, epoch_samples: int) -> None:
        """Stop a run with too much bad data.

        Raises:
            TooManyBadSamples: the share of bad samples is above the limit.
        """
        if self.seen < min(_SAMPLES_BEFORE_JUDGEMENT, epoch_samples):
            return
        share = self.bad / self.seen
        if share > max_error_share:
            raise TooManyBadSamples(
                f"{self.bad} of {self.seen} samples ({share:.1%}) are unusable, the limit is "
                f"{max_error_share:.1%}; see {ERROR_FILE}, or raise max_error_share\n{self.summary()}"
            )

    def summary(self) -> str:
        """One line per source, worst first: samples used, and samples skipped by reason."""
        lines = []
        by_source: dict[str, Counter[str]] = {source: Counter() for source in self.used}
        for (source, reason), count in self.skipped.items():
            by_source.setdefault(source, Counter())[reason] += count
        for source, reasons in sorted(by_source.items(), key=lambda item: -item[1].total()):
            skipped = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            lines.append(
                f"  {source}: {self.used[source]} used" + (f", skipped: {skipped}" if skipped else "")
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "used": dict(self.used),
            "skipped": [[source, reason, count] for (source, reason), count in self.skipped.items()],
            "speech": dict(self.speech),
            "tokens": self.tokens,
            "positions": self.positions,
            "position": self.position,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Report:
        """The counts that :meth:`to_dict` made."""
        skipped = {(source, reason): count for source, reason, count in state["skipped"]}
        return cls(
            Counter(state["used"]),
            Counter(skipped),
            Counter(state["speech"]),
            tokens=state.get("tokens", 0),  # not in checkpoints of earlier versions
            positions=state.get("positions", 0),
            position=state["position"],
        )


class FileJudge:
    """Stops a run if one file yields no document at all, even if its share of the mix is small.

    A file is useless when every row of it was refused, or 64 rows were bad, or 500 were bad or too long, and
    none was usable. Each row is counted once, so a bad row that recurs does not condemn its file. The
    count restarts when a run is resumed.

    Args:
        rows: the number of rows of each file.
    """

    def __init__(self, rows: Mapping[str, int]) -> None:
        self._rows = rows
        self._useful: set[str] = set()
        self._refused: dict[str, dict[int, dict[str, Any]]] = {}

    def check(self, report: Report) -> None:
        """Add the samples read since the last call.

        Raises:
            TooManyBadSamples: a file is useless. The message names the file, the reasons and what to do.
        """
        self._useful |= report.useful_files
        for file in report.useful_files:
            self._refused.pop(file, None)
        for error in report.errors:
            if error["file"] not in self._useful:
                self._refused.setdefault(error["file"], {})[error["row"]] = error
        for file, errors in self._refused.items():
            bad = sum(error["reason"] not in _TOO_LONG for error in errors.values())
            if (
                len(errors) >= min(self._rows[file], _SAMPLES_BEFORE_JUDGEMENT)
                or bad >= _BAD_ROWS_OF_A_USELESS_FILE
            ):
                raise TooManyBadSamples(_describe_useless_file(file, list(errors.values())))


_WHAT_TO_DO = {
    Reason.TOO_LONG.value: "raise --model_max_length",
    Reason.AUDIO_TOO_LONG.value: "raise --model_max_length",
    Reason.NO_CODEC.value: "give a codec",
    "audio_missing": "set --data_root to the base folder of its audio paths",
}


def _describe_useless_file(file: str, errors: list[dict[str, Any]]) -> str:
    reasons = Counter(error["reason"] for error in errors)
    most = reasons.most_common(1)[0][0]
    example = next(error for error in errors if error["reason"] == most)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    advice = _WHAT_TO_DO.get(most, "repair it")
    return (
        f"{example['source']}: all {len(errors)} samples (100.0%) read so far of {file} are unusable ({listed}; "
        f"row {example['row']}: {example['message']}); {advice}, or remove the file from the mix"
    )


class ErrorFile:
    """``data_errors.jsonl``: one line per skipped sample, from all ranks.

    Lines are appended whole, under a lock, so ranks on one or many machines may share the file.

    Args:
        folder: folder of the file. None: errors are counted but not written.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / ERROR_FILE

    def write(self, errors: list[dict[str, Any]]) -> None:
        """Append a line for each error. If the file cannot be written, that is logged and the run continues."""
        if self.path is None or not errors:
            return
        lines = "".join(json.dumps(error, ensure_ascii=False) + "\n" for error in errors)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
                os.write(file, lines.encode("utf-8", "backslashreplace"))
            finally:
                os.close(file)
        except OSError as error:
            logger.error(
                "%s cannot be written (%s); %d errors follow:\n%s", self.path, error, len(errors), lines
            )
