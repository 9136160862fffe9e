"""The passes of a round as functions of tensors: backbone, head, projection. They change the state, nothing else.

Each takes its shapes from its arguments and its places from tensors on the device, reads nothing back to the host,
and can therefore be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, silu

from vita_audio.engine.kernels import attend
from vita_audio.engine.state import State, Window, window_of
from vita_audio.engine.weights import Layer, Weights


def run_layer(weights: Weights, layer: Layer, cache: Tensor, x: Tensor, window: Window) -> Tensor:
    """One decoder layer over a window; keys and values go to the cache.

    Args:
        cache: (rows, length + 1, 2 kv, d_head), of the window's rows.
        x: (rows, width, d).

    Returns:
        (rows, width, d).
    """
    rows, width, _ = x.shape
    queries, kv, size = weights.queries, weights.kv, weights.head_size
    qkv = layer.qkv(layer.input_norm(x)).view(rows, width, queries + 2 * kv, size)
    # Values have cos 1 and sin 0: one operation less than to take them apart first.
    qkv = torch.addcmul(qkv * window.cos, qkv.roll(size // 2, -1), window.sin)
    cache[_rows(rows, x.device), window.write] = qkv[:, :, queries:]
    seen = cache[:, : window.length]
    groups = queries // kv
    query = qkv[:, :, :queries].view(rows, width, kv, groups, size).permute(0, 2, 3, 1, 4)
    heard = attend(
        query.reshape(rows, kv, groups * width, size),
        seen[:, :, :kv].transpose(1, 2),
        seen[:, :, kv:].transpose(1, 2),
        window.masks[layer.window],
    )
    heard = heard.view(rows, kv, groups, width, size).permute(0, 3, 1, 2, 4).reshape(rows, width, queries * size)
    x = layer.out(heard, add=x)
    gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
    return layer.down(silu(gate).mul_(up), add=x)


def run_backbone(weights: Weights, state: State, x: Tensor, window: Window) -> Tensor:
    """All backbone layers over a window. Takes inputs (rows, width, d), returns the normed output, and keeps it."""
    for layer, cache in zip(weights.layers, state.caches, strict=False):
        x = run_layer(weights, layer, cache[window.rows], x, window)
    x = weights.norm(x)
    state.hidden[window.rows][_rows(len(x), x.device), window.write] = x
    return x


def run_head(weights: Weights, state: State, index: int, hidden: Tensor, window: Window) -> Tensor:
    """Head ``index`` over a window.

    Attention in a head depends on differences of positions alone, so it uses those of its states, not of the
    tokens that it reads.

    Args:
        hidden: (rows, width, d): for head 0 the backbone's normed output, else the head before's.

    Returns:
        (rows, width, d), normed; its last position predicts the token after those known.
    """
    head = weights.heads[index]
    tokens = state.tokens[window.rows].gather(1, window.positions + (index + 1))
    fused = torch.cat([head.embed_norm(embedding(tokens, weights.embedding)), head.hidden_norm(hidden)], dim=-1)
    cache = state.caches[weights.num_layers + index][window.rows]
    return weights.norm(run_layer(weights, head.layer, cache, head.proj(fused), window))


def backbone_pass(
    weights: Weights,
    state: State,
    rows: slice,
    active: Tensor,
    width: int,
    length: int,
    prompt: Tensor | None = None,
) -> Tensor:
    """The backbone over the tokens that it has not seen.

    Args:
        active: (rows,) bool, the rows that take part.
        width: the most unseen tokens of a row.
        length: at least the most known tokens of a row.
        prompt: (rows, width, d), inputs that are not plain embeddings.

    Returns:
        (rows, width, d), normed.
    """
    known, seen = state.known[rows], state.seen[rows]
    window = window_of(weights, state, rows, torch.where(active, seen, known), known, width, length)
    if prompt is None:
        prompt = embedding(state.tokens[rows].gather(1, window.positions), weights.embedding)
    hidden = run_backbone(weights, state, prompt, window)
    state.seen[rows] = torch.where(active, known, seen)
    return hidden


def head_window(
    weights: Weights, state: State, rows: slice, passes: Tensor, width: int, length: int
) -> tuple[Window, Tensor]:
    """The window that all heads of a round share: what the backbone has seen and one of its heads has not.

    A head that lags behind the others makes them compute a few positions again. The alternative is to keep what
    every head gave to the next, for all positions: more than all caches together.

    Args:
        passes: (rows,), the heads that each row uses; 0: it takes no part.

    Returns:
        The window, and the backbone's output there, (rows, width, d).
    """
    seen = state.seen[rows]
    # Lengths fall from head to head, so the last head in use has the shortest.
    last = state.seen_heads[rows].gather(1, (passes - 1).clamp(min=0)[:, None]).squeeze(1)
    window = window_of(weights, state, rows, torch.where(passes > 0, last, seen), seen, width, length)
    return window, gather_hidden(state, window)


def gather_hidden(state: State, window: Window) -> Tensor:
    """The backbone's normed output at the positions of a window, (rows, width, d)."""
    places = window.positions[:, :, None].expand(-1, -1, state.hidden.shape[2])
    return state.hidden[window.rows].gather(1, places)


def prompt_pass(
    weights: Weights, state: State, row: int, first: int, last: int, embeds: Tensor | None
) -> None:
    """The backbone over positions ``first`` … ``last`` - 1 of one row.

    Args:
        embeds: (1, last - first, d), inputs that are not plain embeddings.
    """
    window = _span(weights, state, row, first, last)
    if embeds is None:
        embeds = embedding(state.tokens[row : row + 1, first:last], weights.embedding)
    run_backbone(weights, state, embeds, window)
    state.seen[row] = last


def heads_pass(weights: Weights, state: State, row: int, heads: int, first: int, last: int) -> None:
    """The first ``heads`` heads over positions ``first`` … ``last`` - 1 of one row, whose tokens are known."""
    window = _span(weights, state, row, first, last)
    hidden = gather_hidden(state, window)
    for index in range(heads):
        hidden = run_head(weights, state, index, hidden, window)
    state.seen_heads[row, :heads] = last


def _span(weights: Weights, state: State, row: int, first: int, last: int) -> Window:
    ends = torch.tensor([first, last], device=state.known.device)
    return window_of(weights, state, slice(row, row + 1), ends[:1], ends[1:], last - first, last)


def emit(state: State, rows: slice, active: Tensor, tokens: Tensor) -> None:
    """Append one token, (rows,), to each active row."""
    known = state.known[rows]
    spare = state.tokens.shape[1] - 1
    place = torch.where(active, known, spare)
    state.tokens[rows].scatter_(1, place[:, None], tokens[:, None])
    state.known[rows] = known + active


def _rows(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)[:, None]
