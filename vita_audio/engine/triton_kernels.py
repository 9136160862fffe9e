"""Kernels in Triton for GPUs: what lies between a layer's products, and products with weights of 8 bits.

Between its four products PyTorch launches some twelve small kernels a layer, a fifth of a pass's time at 7B, and its
attention reads a long cache with one block for each key head. Here it is a norm, a rotation that also fills the cache,
an attention that shares the cache among blocks, and a gate.

A query's attention does not depend on its company: it is the same sums in the same order for any number of rows and
any length of the cache. ``TRITON_INTERPRET=1`` runs the kernels on a CPU, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vita_audio.engine.kernels import joined
from vita_audio.engine.quantized import to_int8

MOST_POSITIONS = 64
"""Positions of a row up to which this attention is faster than PyTorch's; a chunk of a prompt has more."""
CHUNK = 256
"""Keys that one block of attention reads."""
OUTPUTS, INPUTS = 32, 128
"""Outputs of a product's block, and inputs that it reads at a time."""
MOST_SPLITS = 4
ENOUGH_BLOCKS = 512
"""Blocks that keep a GPU's memory busy; with fewer outputs, several blocks share an output's sum."""


def fits(head_size: int) -> bool:
    """Whether rotation and attention run for heads of this size."""
    return head_size >= 16 and head_size == triton.next_power_of_2(head_size)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, (n, d) -> (n, d); see :class:`~vita_audio.engine.kernels.Norm`."""
    y = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    warps = max(1, min(16, block // 512))
    _rms_norm[(len(x),)](x, weight, y, eps, x.shape[1], x.stride(0), block, num_warps=warps)
    return y


@triton.jit
def _rms_norm(x, weight, y, eps, size, stride, block: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = columns < size
    values = tl.load(x + row * stride + columns, mask=inside, other=0).to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    factors = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * size + columns, (values * scale * factors).to(y.dtype.element_ty), mask=inside)


def gate(gate_up: Tensor) -> Tensor:
    """The gated activation of an MLP: (n, 2 m) -> (n, m)."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, size)
    _gate[(rows, triton.cdiv(size, 1024))](gate_up, y, size, 1024)
    return y


@triton.jit
def _gate(gate_up, y, size, block: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < size
    opening = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0).to(tl.float32)
    values = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0).to(tl.float32)
    opened = opening / (1 + tl.exp(-opening)) * values
    tl.store(y + row * size + columns, opened.to(y.dtype.element_ty), mask=inside)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, places: Tensor, queries: int) -> Tensor:
    """Rotary embedding of queries and keys; keys and values go to the cache.

    Args:
        qkv, cos, sin: (n, queries + 2 kv, d_head); values have cos 1 and sin 0.
        cache: (2, rows, kv, length, d_head).
        places: (n * 2 kv,) where keys and values go, in units of d_head.

    Returns:
        Queries, (n, queries, d_head).
    """
    rows, heads, size = qkv.shape
    query = qkv.new_empty(rows, queries, size)
    _rotate[(rows, heads)](qkv, cos, sin, query, cache, places, heads, queries, size, num_warps=1)
    return query


@triton.jit
def _rotate(qkv, cos, sin, query, cache, places, heads, queries, size: tl.constexpr):
    row, head, columns = tl.program_id(0), tl.program_id(1), tl.arange(0, size)
    start = (row * heads + head) * size
    values = tl.load(qkv + start + columns).to(tl.float32)
    others = tl.load(qkv + start + (columns + size // 2) % size).to(tl.float32)
    values = values * tl.load(cos + start + columns) + others * tl.load(sin + start + columns)
    if head < queries:
        tl.store(query + (row * queries + head) * size + columns, values.to(query.dtype.element_ty))
    else:
        place = tl.load(places + row * (heads - queries) + head - queries)
        tl.store(cache + place * size + columns, values.to(cache.dtype.element_ty))


def attend(
    query: Tensor, cache: Tensor, positions: Tensor, first_row: int, length: int, reach: int | None
) -> Tensor:
    """Attention over a cache: each query sees the positions up to its own, at most ``reach`` of them.

    Args:
        query: (rows * width, queries, d_head); d_head is a power of two from 16 on.
        cache: (2, all rows, kv, places, d_head), keys and values.
        positions: (rows, width) of the queries, all below ``length``.
        first_row: the queries' first row in the cache.

    Returns:
        (rows * width, queries * d_head).
    """
    rows, width = positions.shape
    _, all_rows, kv, places, size = cache.shape
    tokens, queries, _ = query.shape
    chunks = triton.cdiv(length, CHUNK)
    heard = torch.empty_like(query)
    parts = query.new_empty((tokens * queries, chunks, size), dtype=torch.float32) if chunks > 1 else heard
    sums = query.new_empty((tokens * queries, chunks, 2), dtype=torch.float32) if chunks > 1 else heard
    in_tile = 16 if queries // kv * width <= 16 else 32
    tiles = triton.cdiv(queries // kv * width, in_tile)
    _attend[(rows * kv, tiles, chunks)](
        query, cache, positions, heard, parts, sums, 1 / math.sqrt(size), length, reach or 0,
        first_row, all_rows, kv, places, queries, width, chunks,
        size, in_tile, 128 // query.element_size(), CHUNK, chunks > 1,
    )  # fmt: skip
    if chunks > 1:
        block = triton.next_power_of_2(chunks)
        _combine[(tokens * queries,)](parts, sums, heard, chunks, size, block)
    return heard.view(tokens, queries * size)


@triton.jit(do_not_specialize=["length", "first_row", "all_rows", "chunks", "width"])
def _attend(
    query, cache, positions, heard, parts, sums, scale, length, reach,
    first_row, all_rows, kv, places, queries, width, chunks,
    size: tl.constexpr, in_tile: tl.constexpr, step: tl.constexpr, chunk: tl.constexpr, shared: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // kv, tl.program_id(0) % kv
    group = queries // kv
    index = tl.program_id(1) * in_tile + tl.arange(0, in_tile)
    valid = index < group * width
    # Queries of one head, then of the next: a tile of one width reads each position once.
    token = row * width + index % width
    mine = token * queries + head * group + index // width
    columns = tl.arange(0, size)
    q = tl.load(query + mine[:, None] * size + columns[None], mask=valid[:, None], other=0)
    position = tl.load(positions + token, mask=valid, other=-1).to(tl.int32)
    keys = cache + ((first_row + row) * kv + head).to(tl.int64) * places * size
    values = keys + all_rows.to(tl.int64) * kv * places * size
    best = tl.full((in_tile,), -1e30, tl.float32)
    total = tl.zeros((in_tile,), tl.float32)
    mixed = tl.zeros((in_tile, size), tl.float32)
    first = tl.program_id(2) * chunk
    last = tl.minimum(tl.minimum(first + chunk, length), tl.max(position, axis=0) + 1)
    for start in range(first, last, step):
        key = start + tl.arange(0, step)
        there = (key < last)[:, None]
        k = tl.load(keys + key[:, None] * size + columns[None], mask=there, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = key[None] <= position[:, None]
        if reach > 0:
            seen = seen & (key[None] > position[:, None] - reach)
        highest = tl.maximum(best, tl.max(tl.where(seen, scores, -1e30), axis=1))
        weight = tl.where(seen, tl.exp(scores - highest[:, None]), 0.0)
        fade = tl.exp(best - highest)
        v = tl.load(values + key[:, None] * size + columns[None], mask=there, other=0)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, axis=1)
        best = highest
    if shared:
        place = mine * chunks + tl.program_id(2)
        tl.store(parts + place[:, None] * size + columns[None], mixed, mask=valid[:, None])
        tl.store(sums + place * 2, best, mask=valid)
        tl.store(sums + place * 2 + 1, total, mask=valid)
    else:
        result = (mixed / total[:, None]).to(heard.dtype.element_ty)
        tl.store(heard + mine[:, None] * size + columns[None], result, mask=valid[:, None])


@triton.jit(do_not_specialize=["chunks"])
def _combine(parts, sums, heard, chunks, size: tl.constexpr, block: tl.constexpr):
    mine, columns, number = tl.program_id(0), tl.arange(0, size), tl.arange(0, block)
    best = tl.load(sums + (mine * chunks + number) * 2, mask=number < chunks, other=-1e30)
    highest = tl.max(best, axis=0)
    total, mixed = 0.0, tl.zeros((size,), tl.float32)
    for i in range(chunks):  # one after the other: chunks without a seen key change nothing
        fade = tl.exp(tl.load(sums + (mine * chunks + i) * 2) - highest)
        total += fade * tl.load(sums + (mine * chunks + i) * 2 + 1)
        mixed += fade * tl.load(parts + (mine * chunks + i) * size + columns)
    tl.store(heard + mine * size + columns, (mixed / total).to(heard.dtype.element_ty))


class Int8WeightProduct:
    """y = x W^T + b for a fixed weight in 8 bits and inputs as they are, on a GPU.

    See :class:`~vita_audio.engine.kernels.Product`.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None):
        weight, self.bias = joined(weights, biases)
        self.out_features, self.in_features = weight.shape
        whole, self._scale = to_int8(weight)
        self._stride = triton.cdiv(self.in_features, INPUTS) * INPUTS
        self._weight = torch.nn.functional.pad(whole, (0, self._stride - self.in_features))
        blocks = triton.cdiv(self.out_features, OUTPUTS)
        self._splits = min(MOST_SPLITS, self._stride // INPUTS, triton.cdiv(ENOUGH_BLOCKS, blocks))
        self._arrived = torch.zeros(blocks, dtype=torch.int32, device=weight.device)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads."""
        return self._weight.numel()

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(n, in) -> (n, out); ``add`` (n, out) is added to the result, in products without a bias."""
        rows, outputs = len(x), self.out_features
        largest = 256 // x.element_size()  # what the shared memory of a desktop's GPU holds
        in_tile = min(largest, max(16, triton.next_power_of_2(rows)))
        tiles = triton.cdiv(rows, in_tile)
        splits = self._splits if tiles == 1 else 1  # a prompt's many rows keep the GPU busy without
        y = x.new_empty(rows, outputs)
        parts = x.new_empty((splits, rows, outputs), dtype=torch.float32) if splits > 1 else x
        _int8_product[(tiles, len(self._arrived), splits)](
            x, self._weight, self._scale, self.bias, add, y, parts, self._arrived,
            rows, outputs, self.in_features, x.stride(0), self._stride, splits,
            in_tile, OUTPUTS, INPUTS, splits > 1, self.bias is not None, add is not None,
            num_warps=2 if in_tile <= 32 else 4,
        )  # fmt: skip
        return y


@triton.jit(do_not_specialize=["rows"])
def _int8_product(
    x, weight, scale, bias, add, y, parts, arrived,
    rows, outputs, inputs, x_stride, stride, splits,
    in_tile: tl.constexpr, out_tile: tl.constexpr, step: tl.constexpr,
    shared: tl.constexpr, has_bias: tl.constexpr, has_add: tl.constexpr,
):  # fmt: skip
    """A tile of y^T. With ``shared`` there is one tile of rows, and the last of a tile's blocks adds up their sums."""
    # Blocks that follow each other share a weight's tile, which the GPU's cache then holds.
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    out = block * out_tile + tl.arange(0, out_tile)
    row = tile * in_tile + tl.arange(0, in_tile)
    column = tl.arange(0, step)
    steps = stride // step
    total = tl.zeros((out_tile, in_tile), tl.float32)
    w_start = weight + out[:, None].to(tl.int64) * stride + column[None]
    x_start = x + row[None].to(tl.int64) * x_stride + column[:, None]
    for i in tl.range(part * steps // splits * step, (part + 1) * steps // splits * step, step, num_stages=3):
        w_tile = tl.load(w_start + i, mask=(out < outputs)[:, None], other=0)
        here = (row < rows)[None] & (i + column < inputs)[:, None]
        x_tile = tl.load(x_start + i, mask=here, other=0)
        total = tl.dot(w_tile.to(x_tile.dtype), x_tile, total, input_precision="ieee")
    keep = (out < outputs)[:, None] & (row < rows)[None]
    place = row[None].to(tl.int64) * outputs + out[:, None]
    finish = True
    if shared:
        size = rows.to(tl.int64) * outputs
        tl.store(parts + part * size + place, total, mask=keep)
        tl.debug_barrier()
        counter = arrived + block
        finish = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
        if finish:
            total = tl.zeros((out_tile, in_tile), tl.float32)
            for i in range(splits):
                total += tl.load(parts + i * size + place, mask=keep, other=0, cache_modifier=".cg")
            tl.store(counter, 0)
    if finish:
        total = total * tl.load(scale + out, mask=out < outputs, other=0)[:, None]
        if has_bias:
            total += tl.load(bias + out, mask=out < outputs, other=0).to(tl.float32)[:, None]
        if has_add:
            total += tl.load(add + place, mask=keep, other=0).to(tl.float32)
        tl.store(y + place, total.to(y.dtype.element_ty), mask=keep)
