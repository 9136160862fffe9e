"""CUDA graphs: what a round launches, recorded once for each shape and replayed with one call.

A pass at these sizes launches several hundred kernels of a few microseconds. Replayed, the GPU runs them back to back;
launched one by one, it waits for the host. Tensors that a recording reads or writes must stay where they are: the
engine's state does.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

SWITCH = "VITA_AUDIO_CUDA_GRAPHS"
"""Environment variable; 0 launches every kernel from the host, for debugging."""

MOST_GRAPHS = 256


class Graphs:
    """Recordings by key, the least recently used dropped first.

    Args:
        device: where the functions run. Without CUDA every call simply runs its function.
    """

    def __init__(self, device: torch.device):
        self.enabled = device.type == "cuda" and os.environ.get(SWITCH, "1") != "0"
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph | None] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def run(self, key: Hashable | None, function: Callable[[], None]) -> None:
        """Run a function, or replay its recording.

        Args:
            key: names the function and everything that its launches depend on, except what lies in the tensors
                that it reads. The first call with a key runs the function, which also loads its kernels, the second
                one records it. None: the launches are not worth a recording.
        """
        if not self.enabled or key is None:
            function()
            return
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
            function()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                function()
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        graph.replay()
