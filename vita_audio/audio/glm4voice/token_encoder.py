"""The flow's token encoder: block-causal attention with relative positions (section 4.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vita_audio.audio.glm4voice.config import TokenEncoderConfig


class TokenEncoder(nn.Module):
    """Embedded codes to states that attend to the past and to their whole block."""

    def __init__(self, config: TokenEncoderConfig):
        super().__init__()
        width = config.output_size
        self.block_size = config.block_size
        self.embed = nn.ModuleDict(
            {"out": nn.ModuleList([nn.Linear(config.input_size, width), nn.LayerNorm(width)])}
        )
        self.encoders = nn.ModuleList(
            _Block(width, config.attention_heads, config.linear_units) for _ in range(config.num_blocks)
        )
        self.after_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: embedded codes, (rows, codes, input_size).
            key_mask: (rows, codes), True at valid codes; None if all are valid.

        Returns:
            (rows, codes, output_size).
        """
        return self.after_norm(self.hidden_states(x, key_mask)[-1])

    def hidden_states(self, x: Tensor, key_mask: Tensor | None = None) -> list[Tensor]:
        """The scaled embedding, then the output of each block; arguments as ``forward``."""
        layers: Any = self.embed["out"]
        linear, norm = layers
        x = norm(linear(x)) * math.sqrt(norm.normalized_shape[0])
        positions = relative_positions(x.shape[1], x.shape[2]).to(x)
        allowed = self._allowed(x.shape[1], x.device)
        if key_mask is not None:
            allowed = allowed & key_mask[:, None, None, :]
        states = [x]
        for block in self.encoders:
            x = block(x, positions, allowed)
            states.append(x)
        return states

    def _allowed(self, codes: int, device: torch.device) -> Tensor:
        """(codes, codes): the past and the query's own block. The first prompt code has index 0."""
        index = torch.arange(codes, device=device)
        query, key = index[:, None], index[None, :]
        return (key <= query) | (key // self.block_size == query // self.block_size)


def relative_positions(length: int, width: int) -> Tensor:
    """Sinusoids of the distances length-1 ... -(length-1), (2 * length - 1, width)."""
    distance = torch.arange(length - 1, -length, -1, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * -(math.log(10000.0) / width))
    angle = distance * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.self_attn = _RelativeAttention(width, heads)
        self.feed_forward = nn.ModuleDict({"w_1": nn.Linear(width, hidden), "w_2": nn.Linear(hidden, width)})
        self.norm_ff = nn.LayerNorm(width)
        self.norm_mha = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, allowed)
        hidden = F.silu(self.feed_forward["w_1"](self.norm_ff(x)))
        return x + self.feed_forward["w_2"](hidden)


class _RelativeAttention(nn.Module):
    """Transformer-XL attention: content and distance scores, each with its own query bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.pos_bias_u = nn.Parameter(torch.zeros(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.zeros(heads, width // heads))
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        q, k, v, p = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for projection, y in (
                (self.linear_q, x),
                (self.linear_k, x),
                (self.linear_v, x),
                (self.linear_pos, positions),
            )
        )
        by_distance = (q + self.pos_bias_v[:, None]) @ p.transpose(
            -2, -1
        )  # (rows, heads, codes, 2 codes - 1)
        length = x.shape[1]
        index = torch.arange(length, device=x.device)
        row = length - 1 - (index[:, None] - index[None, :])
        distance_score = by_distance.gather(-1, row.expand(*by_distance.shape[:3], length))
        bias = distance_score / math.sqrt(q.shape[-1])
        attended = F.scaled_dot_product_attention(
            q + self.pos_bias_u[:, None], k, v, attn_mask=bias.masked_fill(~allowed, -torch.inf)
        )
        return self.linear_out(attended.transpose(1, 2).flatten(2))
