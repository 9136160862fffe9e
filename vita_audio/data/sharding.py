"""Which shard reads which samples, and its progress.

The mix is one endless stream. A shard, that is, one loader worker of one rank, reads every ``stride``-th
position of it. Its state is its position and the samples that it has read but not yet delivered
(those in open rows): a few hundred integers, no tokens.

Because shards are plain arithmetic, a run can continue with other numbers of ranks and workers. Every undelivered
position before the furthest shard's becomes a backlog, which is dealt to the new shards; from there on the
stream is divided again. No sample is repeated and none is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ShardState:
    """One shard's progress in the stream.

    Attributes:
        offset: its first position.
        stride: distance between its positions; the same for all shards of a run.
        next: the next position to read once the backlog is empty.
        backlog: positions to read before that.
        open: rows being filled: ``[age, positions]``.
        ready: positions of finished rows whose batch is not yet full.
    """

    offset: int
    stride: int
    next: int
    backlog: list[int] = field(default_factory=list)
    open: list[tuple[int, list[int]]] = field(default_factory=list)
    ready: list[list[int]] = field(default_factory=list)

    @classmethod
    def start(cls, rank: int, world_size: int, worker: int, workers: int) -> ShardState:
        """The state before the first sample.

        A rank's positions do not depend on its number of workers, so a single rank can change that number.
        """
        offset = worker * world_size + rank
        return cls(offset, world_size * workers, offset)

    def take(self) -> int:
        """The next position."""
        if self.backlog:
            return self.backlog.pop(0)
        position, self.next = self.next, self.next + self.stride
        return position

    def pending(self) -> Iterator[int]:
        """Positions read or due, but not yet delivered."""
        yield from self.backlog
        for _, positions in self.open:
            yield from positions
        for positions in self.ready:
            yield from positions

    def to_dict(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "stride": self.stride,
            "next": self.next,
            "backlog": list(self.backlog),
            "open": [[age, list(positions)] for age, positions in self.open],
            "ready": [list(positions) for positions in self.ready],
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> ShardState:
        opened = [(age, list(positions)) for age, positions in state["open"]]
        return cls(
            state["offset"],
            state["stride"],
            state["next"],
            list(state["backlog"]),
            opened,
            [list(positions) for positions in state["ready"]],
        )


def reshard(old: Sequence[ShardState], new: Sequence[ShardState]) -> list[ShardState]:
    """Continue the work of some shards on others.

    Args:
        old: states that together cover the positions of ``new``: of a whole run, or of one rank.
        new: the shards to continue on, at their start.

    Returns:
        States of ``new`` that together read exactly the positions that ``old`` had not delivered.
    """
    frontier = max(shard.next for shard in old)
    backlog = sorted(
        position
        for shard in old
        for position in (*shard.pending(), *range(shard.next, frontier, shard.stride))
    )
    continued = []
    for index, shard in enumerate(new):
        steps = max(0, -(-(frontier - shard.offset) // shard.stride))
        continued.append(
            ShardState(
                shard.offset,
                shard.stride,
                shard.offset + steps * shard.stride,
                backlog[index :: len(new)],
            )
        )
    return continued
