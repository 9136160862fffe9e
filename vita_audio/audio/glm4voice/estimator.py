"""The velocity network of the flow decoder: a one-dimensional UNet with transformer blocks (section 4.9).

Rows of different lengths share a batch: ``mask`` marks the valid frames. Everything that mixes
frames respects it (convolutions read zeros outside, group norms and attention use only valid frames),
so a row's result does not depend on the other rows. With equal lengths there is no mask and no cost.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vita_audio.audio.glm4voice.config import EstimatorConfig

_TIME_SCALE = 1000.0
_CONV_GROUPS = 8


class Estimator(nn.Module):
    """Velocity of the mel at solver time ``t``."""

    def __init__(self, config: EstimatorConfig):
        super().__init__()
        widths = config.channels
        time_width = 4 * widths[0]
        self.in_channels = config.in_channels
        self.time_mlp = _TimeMLP(config.in_channels, time_width)

        def stage(inputs: int, outputs: int) -> list[nn.Module]:
            transformers = (
                _TransformerBlock(outputs, config.num_heads, config.attention_head_dim)
                for _ in range(config.n_blocks)
            )
            return [_ResnetBlock(inputs, outputs, time_width), nn.ModuleList(transformers)]

        self.down_blocks = nn.ModuleList()
        for level, (inputs, outputs) in enumerate(
            zip((config.in_channels, *widths[:-1]), widths, strict=True)
        ):
            last = level == len(widths) - 1
            resize: nn.Module = nn.Conv1d(outputs, outputs, 3, padding=1) if last else _Downsample(outputs)
            self.down_blocks.append(nn.ModuleList([*stage(inputs, outputs), resize]))
        self.mid_blocks = nn.ModuleList(
            nn.ModuleList(stage(widths[-1], widths[-1])) for _ in range(config.num_mid_blocks)
        )
        self.up_blocks = nn.ModuleList()
        upward = (*reversed(widths), widths[0])
        for level, (inputs, outputs) in enumerate(pairwise(upward)):
            last = level == len(widths) - 1
            resize = nn.Conv1d(outputs, outputs, 3, padding=1) if last else _Upsample(outputs)
            self.up_blocks.append(nn.ModuleList([*stage(2 * inputs, outputs), resize]))
        self.final_block = _ConvBlock(widths[0], widths[0])
        self.final_proj = nn.Conv1d(widths[0], config.out_channels, 1)

    def forward(
        self, x: Tensor, mu: Tensor, t: Tensor, speaker: Tensor, cond: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            x: noisy mel (rows, 80, frames).
            mu: encoded codes, same shape.
            t: solver time in [0, 1], scalar.
            speaker: (rows, 80).
            cond: known mel (the prompt), zero elsewhere; same shape as ``x``.
            mask: (rows, 1, frames), 1 at valid frames; None if all are valid.

        Returns:
            Velocity, same shape as ``x``.
        """
        time = self.time_mlp(_sinusoid(t, self.in_channels))
        x = torch.cat([x, mu, speaker[:, :, None].expand_as(x), cond], dim=1)
        # A ModuleList does not expose the types of its modules.
        down, middle, up = cast(tuple[Any, Any, Any], (self.down_blocks, self.mid_blocks, self.up_blocks))
        skips = []
        for resnet, transformers, resize in down:
            x = _run_stage(resnet, transformers, x, time, mask)
            skips.append((x, mask))
            x = resize(_inside(x, mask))
            if isinstance(resize, _Downsample) and mask is not None:
                mask = mask[:, :, ::2]
        for resnet, transformers in middle:
            x = _run_stage(resnet, transformers, x, time, mask)
        for resnet, transformers, resize in up:
            skip, mask = skips.pop()
            x = torch.cat([x[:, :, : skip.shape[2]], skip], dim=1)
            x = _run_stage(resnet, transformers, x, time, mask)
            x = resize(_inside(x, mask))
        return self.final_proj(self.final_block(x, mask))


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm whose statistics cover only valid frames."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (rows, channels, frames), mask (rows, 1, frames) or None; same shape as ``x``."""
        if mask is None:
            return super().forward(x)
        rows, channels, frames = x.shape
        grouped = x.view(rows, self.num_groups, -1, frames)
        inside = mask[:, None]
        count = inside.sum((2, 3), keepdim=True) * (channels // self.num_groups)
        mean = (grouped * inside).sum((2, 3), keepdim=True) / count
        centred = (grouped - mean) * inside
        variance = centred.square().sum((2, 3), keepdim=True) / count
        normal = (centred * torch.rsqrt(variance + self.eps)).view_as(x)
        return normal * self.weight[:, None] + self.bias[:, None]


class _TimeMLP(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(time)))


class _ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, padding=1), MaskedGroupNorm(_CONV_GROUPS, outputs)
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        conv, norm = self.block
        return F.mish(norm(conv(_inside(x, mask)), mask))


class _ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, time_width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, outputs))
        self.block1 = _ConvBlock(inputs, outputs)
        self.block2 = _ConvBlock(outputs, outputs)
        self.res_conv = nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.block1(x, mask) + self.mlp(time)[:, :, None]
        return self.block2(hidden, mask) + self.res_conv(x)


class _TransformerBlock(nn.Module):
    """Pre-norm attention over all frames, then a GELU feed-forward; the released names skip norm2."""

    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _Attention(width, heads, head_dim)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, width)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        keys = None if mask is None else mask[:, None].bool()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        # Released names: net.0.proj and net.2; net.1 holds no weights.
        self.net = nn.Sequential(_GELUProjection(width, hidden), nn.Identity(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _GELUProjection(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _run_stage(
    resnet: _ResnetBlock, transformers: nn.ModuleList, x: Tensor, time: Tensor, mask: Tensor | None
) -> Tensor:
    x = resnet(x, time, mask).transpose(1, 2)
    for transformer in transformers:
        x = transformer(x, mask)
    return x.transpose(1, 2)


def _inside(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero frames outside the row, as a convolution expects beyond an edge."""
    return x if mask is None else x * mask


def _sinusoid(t: Tensor, width: int) -> Tensor:
    """Embedding of the solver time, (1, width)."""
    half = width // 2
    decay = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
    angle = _TIME_SCALE * t * decay
    return torch.cat([angle.sin(), angle.cos()])[None]
