"""The norm, and taking rows, each with its backward pass written out.

Autograd records every operation of transformers' RMSNorm, keeps its inputs and runs one backward operation for each;
for an index it adds up rows one by one. Beside the matrix products of a training step this is memory traffic only,
and these functions cause half of it. Values are transformers' own to the bit; gradients agree to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm


class RMSNorm(Qwen2RMSNorm):
    """Qwen2's norm, x / rms(x) * weight; (..., d) in and out."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return _normed(hidden_states, self.weight, self.variance_epsilon)[0]
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed, inverse = _normed(hidden, weight, epsilon)
        ctx.save_for_backward(hidden, weight, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        hidden, weight, inverse = ctx.saved_tensors
        # With x = hidden, n = x * inverse: d loss / d x = inverse * (g - n * mean(g * n)), where g = grad * weight.
        unit = hidden.float() * inverse
        scaled = (grad * weight).float()
        share = torch.linalg.vecdot(scaled, unit).unsqueeze(-1).div_(hidden.shape[-1])
        scaled.addcmul_(unit, share, value=-1).mul_(inverse)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = unit.to(grad.dtype).mul_(grad).flatten(0, -2).sum(dim=0).to(weight.dtype)
        return scaled.to(hidden.dtype), grad_weight, None


def _normed(hidden: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm, and 1 / rms (..., 1) in float32."""
    exact = hidden.float()
    inverse = exact.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()  # as in Qwen2, to the bit
    return (exact * inverse).to(hidden.dtype).mul_(weight), inverse


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` along the first dimension, for an index without repetitions.

    Args:
        values: (rows, …).
        index: (taken,).
    """
    result: Tensor = _TakeRows.apply(values, index)
    return result


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # Autograd's own would add up rows, one after the other, in case an index occurs twice.
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def use_fused_norms(module: nn.Module) -> None:
    """Replace Qwen2's norms in a module by the same ones with a shorter backward pass; weights are kept."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is Qwen2RMSNorm:
                norm = RMSNorm(0, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
