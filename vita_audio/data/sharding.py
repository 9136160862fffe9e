"""Who reads which samples, and how far each has come.

The mix is one endless stream. A shard, that is one loader worker of one rank, reads every ``stride``-th
position of it. Its state is where it stands and which samples it has taken but not yet handed out
(those in open rows): a few hundred integers, no tokens.

Because a shard is arithmetic, a run may continue on other numbers of ranks and workers: everything
below the furthest shard's place that was not handed out becomes a backlog, dealt to the new shards, and
from there on the stream is divided again. No sample is repeated, none is lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class ShardState:
    """One shard's place in the stream.

    Attributes:
        offset: its first position.
        stride: distance between its positions; all shards of a run have the same.
        next: the position that it reads next, once the backlog is empty.
        backlog: positions to read before that.
        open: rows being filled: ``[age, positions]``.
        ready: positions of finished rows that wait for their batch to be full.
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

        A rank's positions do not depend on its number of workers, so a rank alone can change that number.
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
        """Positions taken or due, but not handed out."""
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
        States of ``new`` that read, together, exactly what ``old`` had not handed out.
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
