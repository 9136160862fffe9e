"""What became of every sample: counters, the error file, and the decision to stop.

Workers count and describe; the counts travel with the batches, so what is counted is what the trainer
has received, and a resumed run goes on counting from its checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vita_audio.chat.sample import Reason

logger = logging.getLogger(__name__)

ERROR_FILE = "data_errors.jsonl"
_LEFT_OUT_IN_GOOD_ORDER = frozenset({Reason.TOO_LONG.value, Reason.AUDIO_TOO_LONG.value})
"""Reasons that a sound mix gives too (long texts, short rows); they are counted, but stop no run."""
_SAMPLES_BEFORE_JUDGEMENT = 500


class TooManyBadSamples(RuntimeError):
    """More samples are unusable than the run allows. The message is the summary."""


@dataclass
class Report:
    """Counts since some moment.

    Attributes:
        used: documents by source.
        skipped: samples by (source, reason).
        speech: where codes came from (see :class:`vita_audio.data.speech.SpeechReader`).
        errors: one object per skipped sample, for the error file.
        position: the last stream position that was read.
    """

    used: Counter[str] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str]] = field(default_factory=Counter)
    speech: Counter[str] = field(default_factory=Counter)
    errors: list[dict[str, Any]] = field(default_factory=list)
    position: int = 0

    def add(self, other: Report) -> None:
        """Take over another report's counts (not its error objects)."""
        self.used.update(other.used)
        self.skipped.update(other.skipped)
        self.speech.update(other.speech)
        self.position = max(self.position, other.position)

    @property
    def seen(self) -> int:
        return self.used.total() + self.skipped.total()

    @property
    def bad(self) -> int:
        """Skipped samples that ought not to be in a mix."""
        return sum(
            count for (_, reason), count in self.skipped.items() if reason not in _LEFT_OUT_IN_GOOD_ORDER
        )

    def check(self, max_error_share: float, epoch_samples: int) -> None:
        """Stop a run whose data is bad.

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
        """One line per source: used, and skipped by reason; the worst first."""
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
            "position": self.position,
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Report:
        skipped = {(source, reason): count for source, reason, count in state["skipped"]}
        return cls(
            Counter(state["used"]), Counter(skipped), Counter(state["speech"]), position=state["position"]
        )


class ErrorFile:
    """``data_errors.jsonl``: one line per skipped sample, from all ranks.

    Lines are appended whole, under a lock, so ranks on one or many machines may share the file.

    Args:
        folder: where it lies; nothing is written when absent.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.path = None if folder is None else Path(folder) / ERROR_FILE

    def write(self, errors: list[dict[str, Any]]) -> None:
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
