"""Who runs next. No torch: numbers in, a decision out.

A request passes through three stages: it waits for a row, its prompt is computed in chunks up to the last one, and
then it takes part in rounds. Its first round, which includes the last chunk of its prompt, runs without those that have
started, so they wait for a bounded piece of work and the first chunk of speech never waits for theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from vita_audio.models.schedule import Schedule


class Row(Protocol):
    """What the scheduler asks of a row in use."""

    started: bool
    """The first round has run."""

    @property
    def unseen(self) -> int:
        """Tokens that the backbone has not computed."""

    @property
    def joins(self) -> bool:
        """Whether its first round can run together with others'."""


@dataclass(frozen=True)
class Turn:
    """What to run for the rows ``first`` … ``last`` - 1.

    Attributes:
        kind: ``prompt``: a chunk of one row's prompt, ``first``: the first round of rows that have not started,
            ``round``: a round of all rows that have.
    """

    kind: Literal["prompt", "first", "round"]
    first: int
    last: int


class Scheduler:
    """Prompts and rounds in turn.

    Args:
        chunk: tokens of a prompt that are computed at once while others wait. Alone, ``chunk_alone``.
    """

    def __init__(self, chunk: int, chunk_alone: int):
        self._chunk, self._chunk_alone = chunk, chunk_alone
        self._prompt_ran_last = False

    def chunk(self, rows: Sequence[Row]) -> int:
        """The largest part of a prompt to compute at once."""
        return self._chunk if any(row.started for row in rows) else self._chunk_alone

    def next(self, rows: Sequence[Row]) -> Turn | None:
        """The next turn for the rows in use, in the order in which they came; None without rows."""
        waiting = [index for index, row in enumerate(rows) if not row.started]
        started = len(waiting) < len(rows)
        if waiting and not (started and self._prompt_ran_last):
            self._prompt_ran_last = True
            index = min(waiting, key=lambda each: (rows[each].unseen, each))  # the soonest to speak
            if rows[index].unseen > self.chunk(rows):
                return Turn("prompt", index, index + 1)
            return Turn("first", *self._together(rows, index))
        self._prompt_ran_last = False
        return Turn("round", 0, len(rows)) if started else None

    def _together(self, rows: Sequence[Row], index: int) -> tuple[int, int]:
        """The neighbours whose first round fits into the same chunk."""
        first, last, left = index, index + 1, self.chunk(rows) - rows[index].unseen

        def fits(row: Row) -> bool:
            return not row.started and row.joins and row.unseen <= left

        if rows[index].joins:
            while last < len(rows) and fits(rows[last]):
                left -= rows[last].unseen
                last += 1
            while first > 0 and fits(rows[first - 1]):
                first -= 1
                left -= rows[first].unseen
        return first, last


def segments(schedule: Schedule, num_heads: int, burst: int) -> Iterator[tuple[int, int]]:
    """A schedule as rounds (backbone passes, head passes), endlessly: at most ``burst`` and ``num_heads``.

    A run of heads that is longer than the number of heads goes on with a token from the backbone and head 0.
    """
    for backbone, heads in schedule.rounds():
        while backbone or heads:
            passes = min(backbone, burst)
            backbone -= passes
            run = 0 if backbone else min(heads, num_heads)
            heads -= run
            if heads and not backbone:  # the run goes on
                backbone, heads = 1, heads - 1
            yield passes, run
