"""Shards of one stream: together they read everything once, however often their number changes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.data.sharding import ShardState, reshard


def shards(world_size: int, workers: int) -> list[ShardState]:
    return [
        ShardState.start(rank, world_size, worker, workers)
        for rank in range(world_size)
        for worker in range(workers)
    ]


def run(shard: ShardState, steps: int, keep: int, rest: int) -> list[int]:
    """Take positions; leave some in open rows and in finished ones; return those handed out."""
    held = [*shard.pending()]
    shard.open, shard.ready = [], []
    taken = [position for position in held if position not in shard.backlog]
    taken += [shard.take() for _ in range(steps)]
    handed, kept = taken[: len(taken) - keep], taken[len(taken) - keep :] if keep else []
    shard.open = [(0, kept[: rest % (len(kept) + 1)])]
    shard.ready = [kept[rest % (len(kept) + 1) :]]
    return handed


topologies = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=2, max_size=4)


@given(topologies, st.data())
@settings(max_examples=200, deadline=None)
def test_a_run_whose_size_changes_reads_every_sample_once(sizes, data):
    current, handed = shards(*sizes[0]), []
    for size in sizes[1:]:
        for shard in current:
            steps = data.draw(st.integers(0, 30))
            handed += run(shard, steps, data.draw(st.integers(0, 8)), data.draw(st.integers(0, 8)))
            shard = ShardState.from_dict(shard.to_dict())
        current = reshard(current, shards(*size))
    pending = {position for shard in current for position in shard.pending()}
    frontier = min(shard.next for shard in current)
    assert len(handed) == len(set(handed))
    assert not pending & set(handed)
    assert set(range(frontier)) <= pending | set(handed)
    assert max([*pending, *handed], default=-1) < max(shard.next for shard in current)


def test_a_rank_can_change_its_workers_alone():
    before, after = shards(2, 3), shards(2, 2)
    mine = [shard for shard in before if shard.offset % 2 == 1]
    taken = [shard.take() for shard in mine for _ in range(5)]
    mine[0].next += 4 * mine[0].stride  # one worker is ahead and holds what it took
    mine[0].open = [(0, list(range(mine[0].offset + 5 * 6, mine[0].next, 6)))]
    now = reshard(mine, [shard for shard in after if shard.offset % 2 == 1])
    read = [shard.take() for shard in now for _ in range(40)]
    assert all(position % 2 == 1 for position in read)
    assert not set(taken) & set(read)
    assert set(range(1, 100, 2)) <= set(taken) | set(read)
