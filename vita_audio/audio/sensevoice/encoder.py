"""SenseVoiceSmall's encoder, the audio encoder of the Plus models.

A stack of SAN-M blocks: self-attention in parallel with a depthwise convolution over the values, which
FunASR calls memory. Four learned query frames (language, event, emotion, text form) precede
the speech and are not removed afterwards, so the output is four frames longer than
the input.

Parameters have the names of SenseVoiceSmall's own ``model.pt``, and thus, with a prefix, of the Plus
checkpoints. Definition and numbers: tests/goldens/sensevoice/SPEC.md,
section 3. The network is SAN-M (Gao et al., 2020) as SenseVoice (An et al., 2024) arranges it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vita_audio.audio.sensevoice.checkpoint import (
    SenseVoiceEncoderConfig,
    read_config,
    read_weights,
    sizes_from_weights,
    write_encoder,
)

NUM_QUERY_FRAMES = 4
LANGUAGE_ROWS = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
_EVENT_ROW, _EMOTION_ROW = 1, 2
_WITH_INVERSE_TEXT_NORM_ROW, _WITHOUT_INVERSE_TEXT_NORM_ROW = 14, 15


class SenseVoiceEncoder(nn.Module):
    """Query frames, SAN-M blocks, and SenseVoice's CTC layer.

    The language model does not use the CTC layer; it is kept so that released weights load unchanged.

    Args:
        config: sizes; a dict holds the names of FunASR's ``encoder_conf``.
    """

    def __init__(self, config: SenseVoiceEncoderConfig | dict[str, Any] | None = None) -> None:
        super().__init__()
        if not isinstance(config, SenseVoiceEncoderConfig):
            config = SenseVoiceEncoderConfig.from_dict(config or {})
        self.config = config
        self.embed = nn.Embedding(config.query_embedding_rows, config.input_size)
        self.encoder = SANMStack(config)
        self.ctc = nn.Module()
        self.ctc.ctc_lo = nn.Linear(config.output_size, config.ctc_vocab_size)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str], dtype: torch.dtype = torch.float32
    ) -> SenseVoiceEncoder:
        """Open a folder such as SenseVoiceSmall's (``model.pt`` or safetensors, ``config.yaml`` or json).

        Returns:
            The encoder, in evaluation mode.

        Raises:
            FileNotFoundError: no weights there.
            ValueError: the weights are not a SenseVoice encoder's, or not of the configured sizes.
        """
        weights = read_weights(path)
        config = sizes_from_weights(read_config(path), weights)
        encoder = cls(config).to(dtype)
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{path}: weights do not fit the encoder: {error}") from None
        return encoder.eval()

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder."""
        write_encoder(path, self.config, self.state_dict())

    def forward(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor | Sequence[int] | None = None,
        query_ids: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a padded batch.

        Args:
            features: (batch, frames, 560) from :class:`Frontend`, padded at the end. They are cast
                to the dtype of the weights, as is the position table, which is coarse in bfloat16.
                The released Plus models were trained that way (SPEC 3.5).
            lengths: (batch,) valid frames of each item; None if all are.
            query_ids: the four query rows, see :func:`query_rows`; defaults to automatic language
                without inverse text normalisation.

        Returns:
            (batch, frames + 4, output_size), whose rows beyond an item's length are meaningless,
            and the int64 lengths (batch,), each increased by four.
        """
        batch = len(features)
        rows = torch.tensor(query_ids or query_rows(), device=features.device)
        queries = self.embed(rows)
        inputs = torch.cat([queries.expand(batch, -1, -1), features.to(queries.dtype)], dim=1)
        mask = None
        if lengths is None:
            output_lengths = torch.full((batch,), inputs.shape[1], device=features.device)
        else:
            lengths = torch.as_tensor(lengths, device=features.device, dtype=torch.int64)
            output_lengths = lengths + NUM_QUERY_FRAMES
            mask = torch.arange(inputs.shape[1], device=features.device) < output_lengths[:, None]
        return self.encoder(inputs, mask), output_lengths

    def ctc_log_probs(self, encoded: torch.Tensor) -> torch.Tensor:
        """Log probabilities of SenseVoice's own vocabulary, (batch, frames + 4, vocabulary)."""
        ctc: Any = self.ctc
        return ctc.ctc_lo(encoded).log_softmax(dim=-1)


def query_rows(language: str = "auto", inverse_text_norm: bool = False) -> list[int]:
    """The four rows of the query table, in frame order (SPEC 3.1); unknown languages are ``auto``."""
    return [
        LANGUAGE_ROWS.get(language, LANGUAGE_ROWS["auto"]),
        _EVENT_ROW,
        _EMOTION_ROW,
        _WITH_INVERSE_TEXT_NORM_ROW if inverse_text_norm else _WITHOUT_INVERSE_TEXT_NORM_ROW,
    ]


class SANMStack(nn.Module):
    """Scaling and positions, the main blocks, the ``tp`` blocks, a norm after each group.

    ``gradient_checkpointing`` is transformers' switch: a model that contains this stack sets and configures it
    with its own ``gradient_checkpointing_enable``.
    """

    _gradient_checkpointing_func: Any

    def __init__(self, config: SenseVoiceEncoderConfig) -> None:
        super().__init__()
        width = config.output_size
        self.scale = math.sqrt(width)
        self.dropout = nn.Dropout(config.positional_dropout_rate)
        self.encoders0 = nn.ModuleList([SANMBlock(config, config.input_size)])
        self.encoders = nn.ModuleList(SANMBlock(config, width) for _ in range(config.num_blocks - 1))
        self.after_norm = Float32LayerNorm(width)
        self.tp_encoders = nn.ModuleList(SANMBlock(config, width) for _ in range(config.tp_blocks))
        self.tp_norm = Float32LayerNorm(width)
        self.gradient_checkpointing = False

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(batch, time, input_size) to (batch, time, output_size); mask (batch, time) marks valid frames."""
        positions = sinusoidal_positions(inputs.shape[1], inputs.shape[2], inputs.dtype, inputs.device)
        hidden = self.dropout(inputs * self.scale + positions)
        for block in (*self.encoders0, *self.encoders):
            hidden = self.run_block(block, hidden, mask)
        hidden = self.after_norm(hidden)
        for block in self.tp_encoders:
            hidden = self.run_block(block, hidden, mask)
        return self.tp_norm(hidden)

    def run_block(self, block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """One block, recomputed in the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(block.__call__, hidden, mask)
        return block(hidden, mask)


def sinusoidal_positions(
    count: int, width: int, dtype: torch.dtype, device: torch.device | str | None = None
) -> torch.Tensor:
    """Sines of positions 1 … count, followed by their cosines: (count, width).

    Every step is rounded to ``dtype``, as in the trained models:
    in bfloat16, positions above 256 are not even distinct.
    """
    positions = torch.arange(1, count + 1, device=device).to(dtype)
    log_step = torch.tensor(10_000.0, dtype=dtype, device=device).log() / (width / 2 - 1)
    rates = torch.exp(torch.arange(width // 2, device=device).to(dtype) * -log_step)
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SANMBlock(nn.Module):
    """Attention with memory, then feed-forward, both pre-norm."""

    def __init__(self, config: SenseVoiceEncoderConfig, input_size: int) -> None:
        super().__init__()
        # The first block changes the width, so its attention has no residual connection.
        self.attention_residual = input_size == config.output_size
        self.norm1 = Float32LayerNorm(input_size)
        self.self_attn = SANMAttention(config, input_size)
        self.norm2 = Float32LayerNorm(config.output_size)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        attended = self.dropout(self.self_attn(self.norm1(hidden), mask))
        hidden = hidden + attended if self.attention_residual else attended
        return hidden + self.dropout(self.feed_forward(self.norm2(hidden)))


class SANMAttention(nn.Module):
    """Multi-head attention plus the convolved values (SPEC 3.3)."""

    def __init__(self, config: SenseVoiceEncoderConfig, input_size: int) -> None:
        super().__init__()
        width, kernel = config.output_size, config.kernel_size
        self.heads = config.attention_heads
        self.dropout_rate = config.attention_dropout_rate
        self.linear_q_k_v = nn.Linear(input_size, 3 * width)
        self.linear_out = nn.Linear(width, width)
        self.fsmn_block = nn.Conv1d(width, width, kernel, groups=width, bias=False)
        left = (kernel - 1) // 2 + max(0, config.sanm_shift)
        self.padding = (left, kernel - 1 - left)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.linear_q_k_v(hidden).chunk(3, dim=-1)
        return self.attend(query, key, value, mask) + self.memory(value, mask)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout_rate if self.training else 0.0,
        )
        return self.linear_out(mixed.transpose(1, 2).flatten(2))

    def memory(self, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Each value with its neighbours in time; padding is left out."""
        if mask is not None:
            value = value * mask[..., None]
        convolved = self.fsmn_block(F.pad(value.transpose(1, 2), self.padding)).transpose(1, 2)
        memory = convolved + value
        return memory if mask is None else memory * mask[..., None]


class FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, config: SenseVoiceEncoderConfig) -> None:
        super().__init__()
        self.w_1 = nn.Linear(config.output_size, config.linear_units)
        self.w_2 = nn.Linear(config.linear_units, config.output_size)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.w_2(self.dropout(F.relu(self.w_1(hidden))))


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in float32, for inputs of any type."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(hidden.float(), self.normalized_shape, weight, bias, self.eps).to(hidden.dtype)
