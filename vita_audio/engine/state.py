"""The state of all rows: static caches on the device, and where each row stands.

Nothing here grows or moves while a round runs, so a round can be captured as a CUDA graph. A row is one place in
every tensor; rows in use are always the first ones, see :meth:`State.swap`.

The cache index of a token is its position. Forgetting the end of a row is therefore lowering its lengths, and keys
beyond a row's length are never seen: every query sees the positions up to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vita_audio.engine.cpu_kernels import KEYS, cache_shape
from vita_audio.engine.weights import Weights


class State:
    """Caches of every layer and head, the tokens, and the lengths of ``rows`` rows; a round makes ``most`` tokens.

    Attributes:
        caches: for each layer, then each head, (2, rows, kv, length + 1, d_head): keys, then values. What a pass
            must not keep is written to the last place, which no query sees. The CPU's own kernels use another layout,
            :func:`vita_audio.engine.cpu_kernels.cache_shape`.
        tokens: (rows, length + spare) ids; ``known`` of each row are valid.
        hidden: (rows, length + 1, d), the backbone's normed output, the input of the heads.
        known: (rows,) tokens, of which the last ``drafts`` (rows,) are not verified yet.
        seen: (rows,) positions that the backbone has computed.
        seen_heads: (rows, heads) positions that each head has computed, falling from head to head. The last may be
            computed from unverified drafts.
        backbone_steps, head_steps: (rows,) passes that a row takes part in this round.
        uniforms: (rows, draws) numbers in [0, 1) for this round.
        starts: (rows,) verified tokens at the start of the round.
        report: (rows, 3 + heads + most), at its end: verified tokens, ``drafts``, ``seen``, ``seen_heads``, and the
            ids from the start on.
    """

    def __init__(self, weights: Weights, rows: int, length: int, most: int):
        device, dtype = weights.device, weights.dtype
        self.rows, self.length, self.most = rows, length, most
        self._block, places, size = 1, length + 1, weights.head_size
        if (
            weights.backbone_pass is not None
        ):  # in blocks, with one more place, since values are read in pairs
            self._block, (places, size) = KEYS, cache_shape(length + 2, size)
        self.caches = [
            zeros((2, rows, weights.kv, places, size), dtype, device)
            for _ in range(weights.num_layers + weights.num_heads)
        ]
        self.hidden = zeros((rows, length + 1, weights.d), dtype, device)
        # A head reads as many tokens ahead as its number, also at places that are not kept.
        self.tokens = torch.zeros(rows, length + weights.num_heads + 2, dtype=torch.long, device=device)
        self.known = torch.zeros(rows, dtype=torch.long, device=device)
        self.seen = torch.zeros_like(self.known)
        self.seen_heads = torch.zeros(rows, weights.num_heads, dtype=torch.long, device=device)
        self.drafts = torch.zeros_like(self.known)
        self.backbone_steps = torch.zeros_like(self.known)
        self.head_steps = torch.zeros_like(self.known)
        self.starts = torch.zeros_like(self.known)
        self.report = torch.zeros(rows, 3 + weights.num_heads + most, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(rows, most + weights.num_heads, dtype=torch.float64, device=device)
        self.cos, self.sin = weights.rotary(length + 1)
        # Constants of windows, made once.
        self.columns = torch.arange(length, device=device)
        self.row_places = torch.arange(rows, device=device)[:, None] * (length + 1)
        keys = torch.arange(weights.kv, device=device) * (length + 1)
        self.head_places = torch.cat([keys, keys + rows * weights.kv * (length + 1)])
        self.ones = torch.ones(1, 1, 1, dtype=dtype, device=device)
        self.zeros = torch.zeros_like(self.ones)

    @property
    def lengths(self) -> tuple[Tensor, ...]:
        """Everything that says where a row stands."""
        return self.known, self.seen, self.seen_heads, self.drafts

    def set(self, row: int, known: int, seen: int, seen_heads: Sequence[int]) -> None:
        """Put a row where it has ``known`` verified tokens; what was computed from ``seen`` on is forgotten."""
        self.known[row], self.seen[row], self.drafts[row] = known, seen, 0
        self.seen_heads[row] = torch.tensor(seen_heads, dtype=torch.long)

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange two rows that hold at most ``length`` tokens each."""
        if one == other:
            return
        places = [one, other]
        whole = -(-length // self._block) * self._block
        for cache in self.caches:
            cache[:, places, :, :whole] = cache[:, places[::-1], :, :whole]
        self.hidden[places, :length] = self.hidden[places[::-1], :length]
        for tensor in (self.tokens, *self.lengths):
            tensor[places] = tensor[places[::-1]]

    @property
    def num_bytes(self) -> int:
        """Bytes reserved for caches; on a CPU only what was written takes memory."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.caches, self.hidden))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. On a CPU its pages take memory when they are first written to."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(frozen=True)
class Window:
    """The positions that a pass computes, the same number in each row, the last one at the right; n = rows * width.

    Attributes:
        rows: which rows take part.
        positions: (rows, width); 0 where a row has fewer.
        places: (n,) in all rows' positions in one, (rows * (length + 1)). cache_places: (n * 2 kv,) in a cache's.
        cos, sin: (n, queries + 2 kv, d_head), see :func:`vita_audio.engine.kernels.rotate`. Where a CPU's own kernels
            rotate, (length + 1, d_head), of all positions.
        masks: for each reach of attention (None: all) what is added to the scores, (rows, 1, groups * width, length).
            None: a kernel of the engine's own attends, and knows from the positions.
        length: positions of the caches that are read.
    """

    rows: slice
    positions: Tensor
    places: Tensor
    cache_places: Tensor
    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None] | None
    length: int


def window_of(
    weights: Weights,
    state: State,
    rows: slice,
    first: Tensor,
    end: Tensor,
    width: int,
    length: int,
    exact: bool = False,
) -> Window:
    """The window of positions ``first`` … ``end`` - 1 of each row.

    Args:
        first, end: (rows,); at most ``width`` apart. A row with first = end takes no part.
        width: positions computed in each row.
        length: positions of the caches to read, at least the largest ``end``.
        exact: there is one row, and ``length`` is its ``end``.
    """
    positions = end[:, None] - width + state.columns[:width]
    places = torch.where(positions >= first[:, None], positions, state.length)
    positions = positions.clamp(min=0)
    cache_places = (state.row_places[rows] * weights.kv + places)[:, :, None] + state.head_places
    whole = weights.backbone_pass is not None
    cos, sin = (state.cos, state.sin) if whole else rotation(weights, state, positions)
    groups = weights.queries // weights.kv
    return Window(
        rows=rows,
        positions=positions,
        places=(state.row_places[rows] + places).flatten(),
        cache_places=cache_places.flatten(),
        cos=cos,
        sin=sin,
        masks=None
        if weights.attends(width)
        else {
            reach: None
            if exact and width == 1 and reach is None
            else causal_mask(positions, state.columns[:length], reach, groups, weights.dtype)
            for reach in weights.reaches
        },
        length=length,
    )


def rotation(weights: Weights, state: State, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (n, queries + 2 kv, d_head), for all heads at n positions; of values they are 1 and 0."""
    flat = positions.flatten()
    cos, sin = state.cos[flat][:, None], state.sin[flat][:, None]
    rotated = (len(flat), weights.queries + weights.kv, weights.head_size)
    kept = (len(flat), weights.kv, weights.head_size)
    return (
        torch.cat([cos.expand(rotated), state.ones.expand(kept)], dim=1),
        torch.cat([sin.expand(rotated), state.zeros.expand(kept)], dim=1),
    )


def causal_mask(
    positions: Tensor, keys: Tensor, reach: int | None, groups: int, dtype: torch.dtype
) -> Tensor:
    """What is added to the scores: 0 for the positions that a query sees, minus infinity elsewhere.

    Args:
        positions: (rows, width) of queries. keys: (length,) positions.
        reach: how far back a query sees; None: to the start.

    Returns:
        (rows, 1, groups * width, length); the queries of a group are the outer dimension.
    """
    hidden = keys > positions[:, :, None]
    if reach is not None:
        hidden |= keys <= positions[:, :, None] - reach
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)
    return mask[:, None].expand(-1, groups, -1, -1).flatten(1, 2)[:, None]
