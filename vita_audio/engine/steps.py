"""The passes of a round as functions of tensors: backbone, head, projection. They change the state, nothing else.

Each takes its shapes from its arguments and its places from tensors on the device, reads nothing back to the host,
and can therefore be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vita_audio.engine.kernels import attend, gate, rotate
from vita_audio.engine.state import State, Window, window_of
from vita_audio.engine.weights import Layer, Weights


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """(n,) ids -> (n, d). A GPU takes 8 µs to look up a few ids in PyTorch's way, and 2 µs to index."""
    if tokens.device.type == "cpu":
        return embedding(tokens, weights.embedding)
    return weights.embedding[tokens]


def run_layer(weights: Weights, layer: Layer, cache: Tensor, x: Tensor, window: Window) -> Tensor:
    """One decoder layer over a window; keys and values go to the cache.

    Args:
        cache: (2, all rows, kv, length + 1, d_head).
        x: (n, d); may be overwritten.

    Returns:
        (n, d).
    """
    heard = attention(weights, layer, cache, layer.qkv(layer.input_norm(x)), window)
    x = layer.out(heard, add=x)
    gate_up = layer.gate_up(layer.mlp_norm(x))
    return layer.down(gate(gate_up) if weights.fused is None else weights.fused.gate(gate_up), add=x)


def attention(weights: Weights, layer: Layer, cache: Tensor, qkv: Tensor, window: Window) -> Tensor:
    """Rotary embedding, the cache, and attention over it: (n, (queries + 2 kv) d_head) -> (n, queries * d_head)."""
    rows, width = window.positions.shape
    queries, kv, size = weights.queries, weights.kv, weights.head_size
    qkv = qkv.view(-1, queries + 2 * kv, size)
    if window.masks is None:
        assert weights.fused is not None
        query = weights.fused.rotate(qkv, window.cos, window.sin, cache, window.cache_places, queries)
        return weights.fused.attend(
            query, cache, window.positions, window.rows.start, window.length, layer.window
        )
    query, keys_values = rotate(qkv, window.cos, window.sin, rows, width, queries, kv)
    cache.view(-1, size).index_copy_(0, window.cache_places, keys_values)
    keys, values = cache[:, window.rows, :, : window.length].unbind()
    heard = attend(query, keys, values, window.masks[layer.window])
    heard = heard.view(rows, kv, queries // kv, width, size).permute(0, 3, 1, 2, 4)
    return heard.reshape(-1, queries * size)


def run_backbone(weights: Weights, state: State, x: Tensor, window: Window) -> Tensor:
    """All backbone layers over a window. Takes inputs (n, d), returns the normed output, and keeps it."""
    caches = state.caches[: weights.num_layers]
    if weights.backbone_pass is not None:
        x = weights.backbone_pass(caches, x, window)
    else:
        for layer, cache in zip(weights.layers, caches, strict=True):
            x = run_layer(weights, layer, cache, x, window)
        x = weights.norm(x)
    state.hidden.view(-1, weights.d).index_copy_(0, window.places, x)
    return x


def run_head(weights: Weights, state: State, index: int, hidden: Tensor, window: Window) -> Tensor:
    """Head ``index`` over a window.

    Attention in a head depends on differences of positions alone, so it uses those of its states, not of the
    tokens that it reads.

    Args:
        hidden: (n, d): for head 0 the backbone's normed output, else the head before's.

    Returns:
        (n, d), normed; the last position of a row predicts the token after those known.
    """
    head, cache = weights.heads[index], state.caches[weights.num_layers + index]
    if weights.head_passes:
        return weights.head_passes[index](cache, state.tokens, index + 1, hidden, window)
    tokens = state.tokens[window.rows].gather(1, window.positions + (index + 1)).flatten()
    fused = torch.cat([head.embed_norm(embed(weights, tokens)), head.hidden_norm(hidden)], dim=-1)
    return weights.norm(run_layer(weights, head.layer, cache, head.proj(fused), window))


def backbone_pass(
    weights: Weights,
    state: State,
    rows: slice,
    active: Tensor | None,
    width: int,
    length: int,
    exact: bool = False,
    prompt: Tensor | None = None,
) -> tuple[Window, Tensor]:
    """The backbone over the tokens that it has not seen.

    Args:
        active: (rows,) bool, the rows that take part; None: all.
        width: the most unseen tokens of a row.
        length, exact: see :func:`~vita_audio.engine.state.window_of`.
        prompt: (rows * width, d), inputs that are not plain embeddings.

    Returns:
        Its window, and the normed output there, (rows * width, d).
    """
    known, seen = state.known[rows], state.seen[rows]
    first = seen if active is None else torch.where(active, seen, known)
    window = window_of(weights, state, rows, first, known, width, length, exact)
    if prompt is None:
        tokens = state.tokens[rows].gather(1, window.positions).flatten()
        prompt = embed(weights, tokens)
    hidden = run_backbone(weights, state, prompt, window)
    seen.copy_(known if active is None else torch.where(active, known, seen))
    return window, hidden


def head_window(
    weights: Weights, state: State, rows: slice, passes: Tensor, width: int, length: int
) -> tuple[Window, Tensor]:
    """The window that all heads of a round share: what the backbone has seen and one of its heads has not.

    A head that lags behind the others makes them compute a few positions again. The alternative is to keep what
    every head gave to the next, for all positions: more than all caches together.

    Args:
        passes: (rows,), the heads that each row uses; 0: it takes no part.

    Returns:
        The window, and the backbone's output there, (rows * width, d).
    """
    seen = state.seen[rows]
    # Lengths fall from head to head, so the last head in use has the shortest.
    last = state.seen_heads[rows].gather(1, (passes - 1).clamp(min=0)[:, None]).squeeze(1)
    window = window_of(weights, state, rows, torch.where(passes > 0, last, seen), seen, width, length)
    return window, gather_hidden(state, window)


def gather_hidden(state: State, window: Window) -> Tensor:
    """The backbone's normed output at the positions of a window, (n, d)."""
    places = (state.row_places[window.rows] + window.positions).flatten()
    return state.hidden.flatten(0, 1)[places]


def prompt_pass(
    weights: Weights, state: State, row: int, first: int, last: int, embeds: Tensor | None
) -> None:
    """The backbone over positions ``first`` … ``last`` - 1 of one row.

    Args:
        embeds: (last - first, d), inputs that are not plain embeddings.
    """
    window = _span(weights, state, row, first, last)
    if embeds is None:
        embeds = embed(weights, state.tokens[row, first:last])
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


def emit(state: State, rows: slice, active: Tensor | None, tokens: Tensor) -> None:
    """Append one token, (rows,), to each active row; None: all are."""
    known = state.known[rows]
    place = known if active is None else torch.where(active, known, state.tokens.shape[1] - 1)
    state.tokens[rows].scatter_(1, place[:, None], tokens[:, None])
    known.add_(1 if active is None else active)
