"""The operations of a pass. Two take its time: matrix products with few rows, and attention over a cache.

A pass of decoding multiplies 1 to 30 rows with every weight, so it runs at the speed at which weights are read. Where
kernels of the engine's own can run, :func:`gpu_kernels` and :func:`cpu_kernels` have them. What follows here is
PyTorch's: on CPUs its own product is far from that speed for few rows, oneDNN's with weights in its blocked layout is
closer to it (docs/log.md has the figures). The blocked copy doubles the memory of the weights.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

SMALLEST_PACKED = 1 << 19
"""Bytes of a float32 matrix from which oneDNN's product can be the faster one; below, its call costs more."""
SMALLEST_PACKED_ROW = 1 << 21
"""The same for a single row, where PyTorch has a matrix-vector product without a copy of its own."""


SWITCH = "VITA_AUDIO_KERNELS"
"""Environment variable; 0 leaves the work to PyTorch's kernels alone, for debugging."""

_logger = logging.getLogger(__name__)


def gpu_kernels(device: torch.device) -> ModuleType | None:
    """:mod:`~vita_audio.engine.triton_kernels` where they can run."""
    if device.type != "cuda" or os.environ.get(SWITCH, "1") == "0" or find_spec("triton") is None:
        return None
    return _tried_on_gpu(device)


def cpu_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """:mod:`~vita_audio.engine.cpu_kernels` where they can run, for weights of a type."""
    supported = dtype in (torch.bfloat16, torch.float32)
    if device.type != "cpu" or not supported or os.environ.get(SWITCH, "1") == "0":
        return None
    return _tried_on_cpu()


@cache
def _tried_on_gpu(device: torch.device) -> ModuleType | None:
    """The kernels, once one of them has run: Triton needs a C compiler, Python's headers, and a GPU that it knows."""
    try:
        from vita_audio.engine import triton_kernels

        with torch.accelerator.device_index(device.index):
            triton_kernels.gate(torch.zeros(1, 2, device=device))
    except Exception as error:
        _warn("Triton cannot run here", error)
        return None
    return triton_kernels


@cache
def _tried_on_cpu() -> ModuleType | None:
    """The kernels, once they are compiled: this needs a C++ compiler and Python's headers."""
    from vita_audio.engine import cpu_kernels

    try:
        cpu_kernels.extension()
    except Exception as error:
        _warn("those for this CPU cannot be compiled here", error)
        return None
    return cpu_kernels


def _warn(what: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    _logger.warning("the engine runs on PyTorch's kernels alone, since %s: %s", what, reason)


class Product:
    """y = x W^T + b for a fixed weight, on its device.

    Args:
        weights: (out_i, in) each; they are joined along their outputs.
        biases: (out_i,) each, or None for all.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None):
        weight, self.bias = joined(weights, biases)
        self.out_features, self.in_features = weight.shape
        self._weight, self._transposed = weight, weight.t()
        self._packed: Tensor | None = pack(weight)
        small = weight.dtype == torch.float32 and weight.numel() * weight.element_size() < SMALLEST_PACKED_ROW
        self._fewest_rows = 2 if small else 1

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads."""
        size = self._weight.element_size()
        return size * self.in_features * self.out_features

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(n, in) -> (n, out); ``add`` (n, out) is added to the result, in products without a bias, and may be
        overwritten."""
        if self._packed is None or len(x) < self._fewest_rows:
            if add is not None:
                return add.addmm_(x, self._transposed)
            if self.bias is not None:
                return torch.addmm(self.bias, x, self._transposed)
            return torch.mm(x, self._transposed)
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, self._packed, self.bias, "add")


def joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
    """One weight (sum of out_i, in) from several, and their biases, zero where one has none; None if none has."""
    weight = weights[0].detach() if len(weights) == 1 else torch.cat([each.detach() for each in weights])
    if biases is None or all(bias is None for bias in biases):
        return weight, None
    parts = [
        weights[i].new_zeros(len(weights[i])) if bias is None else bias.detach()
        for i, bias in enumerate(biases)
    ]
    return weight, torch.cat(parts)


def pack(weight: Tensor) -> Tensor | None:
    """A weight (out, in) in oneDNN's blocked layout; None where PyTorch's own product is the better one."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.float32:
        if weight.numel() * weight.element_size() < SMALLEST_PACKED:
            return None
    elif weight.dtype != torch.bfloat16 or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 11)


class Norm:
    """RMSNorm over the last dimension for a fixed weight, (d,), on its device.

    On CPUs PyTorch composes it of nine operations. Four give the same: x w sqrt(d) / sqrt(sum x^2 + d eps).
    """

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight.detach(), eps
        self._fused = gpu_kernels(weight.device)
        self._scale = self.weight.float() * math.sqrt(weight.numel())
        self._least = torch.tensor(math.sqrt(weight.numel() * eps))

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, d)."""
        if self._fused is not None:
            return self._fused.rms_norm(x, self.weight, self.eps)
        if x.device.type != "cpu":
            return rms_norm(x, self.weight.shape, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).hypot_(self._least)
        return x.div(length).mul_(self._scale).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of few queries over a cache, grouped queries folded into the rows.

    Args:
        query: (rows, kv_heads, queries, d_head).
        key, value: (rows, kv_heads, length, d_head), of any strides.
        mask: (rows, 1, queries, length), added to the scores; None: everything is seen.

    Returns:
        (rows, kv_heads, queries, d_head).
    """
    return scaled_dot_product_attention(query, key, value, mask)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, rows: int, width: int, queries: int, kv: int
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, and the layouts of attention and cache.

    Args:
        qkv: (rows * width, queries + 2 kv, d_head).
        cos, sin: of the same shape. Values have cos 1 and sin 0: one operation less than to take them apart first.

    Returns:
        Queries (rows, kv, groups * width, d_head); keys and values (rows * width * 2 kv, d_head).
    """
    size = qkv.shape[2]
    turned = torch.addcmul(qkv * cos, qkv.roll(size // 2, -1), sin)
    query = turned[:, :queries].reshape(rows, width, kv, queries // kv, size).permute(0, 2, 3, 1, 4)
    return query.reshape(rows, kv, -1, size), turned[:, queries:].reshape(-1, size)


def gate(gate_up: Tensor) -> Tensor:
    """The gated activation of an MLP: (n, 2 m) -> (n, m)."""
    half = gate_up.shape[-1] // 2
    return silu(gate_up[:, :half]).mul_(gate_up[:, half:])
