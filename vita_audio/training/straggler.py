"""Names the process that is slower than the others.

Processes wait for each other in every step, so their step times are equal. What differs is the time a process works
on its own: it waits for its rows and computes the loss, before gradients are exchanged. Each process adds these up;
when losses are logged one number of each is gathered, and a process that took :data:`SLOWER` times the median is
named with its machine. With ZeRO-3 the forward pass itself waits for the others' weights, so only slow data shows.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

logger = logging.getLogger(__name__)

SLOWER = 1.5
"""Times the median of all processes."""
_NOTICEABLE_SECONDS = 0.05
"""Of a step. A smaller difference is noise."""


class Straggler:
    """Measures this process's own work, and compares it with the others'.

    Args:
        device: where losses are computed; CUDA's events measure there, without waiting for the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._hosts: list[str] | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count the time in this context as this process's own work on its device."""
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def rows(self, loader: Any) -> Iterator[Any]:
        """The loader's batches; waiting for them counts as work."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._seconds += time.perf_counter() - began
            yield batch

    def report(self, step: int, steps: int) -> None:
        """Compare the work since the last report; call on all processes, where the host waits for the device anyway.

        Args:
            step: the optimizer step, for the log.
            steps: how many there were since the last report.
        """
        seconds = (
            self._seconds + sum(start.elapsed_time(end) for start, end in self._events if end.query()) / 1000
        )
        self._seconds, self._events = 0.0, []
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return
        if self._hosts is None:
            self._hosts = [""] * distributed.get_world_size()
            distributed.all_gather_object(self._hosts, socket.gethostname())
        mine = torch.tensor(seconds / max(1, steps), device=self._device)
        everyone = [torch.zeros_like(mine) for _ in self._hosts]
        distributed.all_gather(everyone, mine)
        line = describe_straggler([each.item() for each in everyone], self._hosts)
        if line is not None and distributed.get_rank() == 0:
            logger.warning("step %d: %s", step, line)


def describe_straggler(seconds: list[float], hosts: list[str]) -> str | None:
    """One line about the slowest process; None if it keeps up.

    Args:
        seconds: own work per step of each rank.
        hosts: their machines.
    """
    # Of two processes the median is the faster.
    median = sorted(seconds)[(len(seconds) - 1) // 2]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    most = seconds[slowest]
    if most < SLOWER * median or most - median < _NOTICEABLE_SECONDS:
        return None
    return (
        f"rank {slowest} on {hosts[slowest]} is slow: {most:.2f} s a step for rows and forward pass, the median of "
        f"{len(seconds)} processes is {median:.2f} s"
    )
