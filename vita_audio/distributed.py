"""Rank, world size and exchanges between the processes of a launch.

torchrun passes each process its rank in the environment, so the rank is known before any connection is
made. A process that was started alone has rank 0 of 1. The exchanges connect the processes on first
use, over gloo, unless they are already connected.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch.distributed import Store

Value = TypeVar("Value")


_store: Store | None = None


class RefusedElsewhere(ValueError):
    """Another process of the launch raised an error; the message is that error's."""


def rank() -> int:
    """This process's number among all processes of the launch, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes of the launch, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """The number of processes of the launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process does the writing and logging that must happen only once."""
    return rank() == 0


def gather_objects(mine: Value) -> list[Value]:
    """Every process's value, in every process, in rank order. All processes must call it."""
    if world_size() == 1:
        return [mine]
    from torch import distributed

    _connect()
    values: list[Value] = [mine] * world_size()
    distributed.all_gather_object(values, mine)
    return values


def shared_numbers(name: str) -> Iterator[int]:
    """0, 1, 2, …: each number is given to one process of the launch only, to the first that asks for it.

    Args:
        name: processes that give the same name share the numbers. All processes must call it.
    """
    if world_size() == 1:
        yield from itertools.count()
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    global _store
    if _store is None:
        _store = next(rendezvous("env://"))[0]
    store = PrefixStore("shared_numbers", _store)
    while True:
        yield store.add(name, 1) - 1


def barrier() -> None:
    """Wait until all processes have reached this point."""
    if world_size() > 1:
        from torch import distributed

        _connect()
        distributed.barrier()


@contextmanager
def agreed(*errors: type[Exception]) -> Iterator[None]:
    """A section of the program that either all processes complete, or none.

    If one process raises one of ``errors``, the others raise too, so no process waits for one that has
    already exited. All processes must enter the section, and nothing inside it may wait for other processes.

    Raises:
        RefusedElsewhere: another process raised an error and this one did not.
    """
    error: Exception | None = None
    try:
        yield
    except errors as refused:
        error = refused
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RefusedElsewhere(f"{message} (process {number} of {world_size()})")


def _connect() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
