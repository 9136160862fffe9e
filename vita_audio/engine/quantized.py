"""Products with weights of 8 bits: half the memory of bfloat16, and on CPUs integer arithmetic.

Weights have one scale per output. On a CPU inputs have one per row, so a row's result does not depend on its company;
sums are exact integers, and the loss is the rounding of weights and inputs alone. On a GPU inputs stay as they are
(:class:`~vita_audio.engine.triton_kernels.Int8WeightProduct`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vita_audio.engine.kernels import joined

LARGEST = 127
LARGEST_WITHOUT_VNNI = 63
"""Largest weight where a CPU adds two products of 8 bits in 16: 2 * 255 * 63 fits."""
ZERO_POINT = 128
"""Of inputs, which the kernel takes unsigned."""


def to_int8(weight: Tensor, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    """A weight (out, in) as integers up to ``largest``, and their scales, (out,) float32."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return (weight / scale[:, None]).round_().to(torch.int8), scale


class Int8Product:
    """y = x W^T + b for a fixed weight in 8 bits, on a CPU; see :class:`~vita_audio.engine.kernels.Product`."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None):
        weight, self.bias = joined(weights, biases)
        self.out_features, self.in_features = weight.shape
        largest = LARGEST if torch.cpu._is_vnni_supported() else LARGEST_WITHOUT_VNNI
        quantized, self._scale = to_int8(weight, largest)
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(quantized, None)
        self._zero_points = torch.zeros(self.out_features, dtype=torch.long)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads."""
        return self.in_features * self.out_features

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(n, in) -> (n, out); ``add`` (n, out) is added to the result, in products without a bias."""
        step = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True, dtype=torch.float32)
        step.clamp_(min=torch.finfo(torch.float32).tiny).div_(LARGEST)
        quantized = x.div(step).round_().add_(ZERO_POINT).to(torch.uint8)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            quantized,
            1.0,
            ZERO_POINT,
            self._packed,
            self._scale,
            self._zero_points,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        offset = self.bias if add is None else add
        y = y.mul_(step) if offset is None else torch.addcmul(offset.float(), y, step)
        return y.to(x.dtype)
