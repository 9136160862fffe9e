"""The speaker embedding of published SIM figures: an ECAPA-TDNN over WavLM's layers.

``wavlm_large_finetune.pth`` (UniSpeech's speaker verification, used by seed-tts-eval) holds under ``model`` an
ECAPA-TDNN and, below ``feature_extract.model.``, WavLM under the names of its first release. Here transformers' WavLM
computes the layers; :func:`_wavlm_weights` gives its names. All sizes are read from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel

from vita_audio.evaluation.similarity import SpeakerEncoder

_WAVLM = "feature_extract.model."
_SCALE = 8  # of Res2Net
_EPSILON = 1e-6
Weights = Mapping[str, Tensor]


class WavLMSpeakerEncoder(SpeakerEncoder):
    """The embedding of ``wavlm_large_finetune.pth``.

    Args:
        path: the file.

    Raises:
        ValueError: the file holds another network.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        super().__init__()
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name: value.float() for name, value in stored.get("model", stored).items()}
        try:
            self._network = SpeakerNetwork(weights).to(device).eval()
        except (KeyError, RuntimeError) as error:
            problem = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not the weights of wavlm_large_finetune.pth: {problem}") from error
        self._device = device

    @torch.inference_mode()
    def embed(self, waveform: Tensor) -> Tensor:
        embedding: Tensor = self._network(waveform[None].to(self._device))
        return embedding[0].cpu()


class SpeakerNetwork(nn.Module):
    """WavLM's layers, weighted, through an ECAPA-TDNN of three blocks with dilations 2, 3 and 4.

    Parameters have the names of the published file, except WavLM's, which have those of transformers.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.wavlm = WavLMModel(_wavlm_config(weights))
        channels, width, _ = weights["layer1.conv.weight"].shape
        pooled = len(weights["conv.weight"])
        self.feature_weight = nn.Parameter(torch.zeros(len(weights["feature_weight"])))
        self.instance_norm = nn.InstanceNorm1d(width)
        self.layer1 = ConvReluNorm(width, channels, 5, padding=2)
        bottleneck = len(weights["layer2.SE_Connect.linear1.weight"])
        self.layer2, self.layer3, self.layer4 = (
            Res2Block(channels, dilation, bottleneck) for dilation in (2, 3, 4)
        )
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.pooling = AttentivePooling(pooled, len(weights["pooling.linear1.weight"]))
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, len(weights["linear.weight"]))
        own = {name: value for name, value in weights.items() if not name.startswith("feature_extract.")}
        own |= {f"wavlm.{name}": value for name, value in _wavlm_weights(weights).items()}
        known = self.state_dict()
        # Training leaves its loss's projection in the file.
        self.load_state_dict({name: value for name, value in own.items() if name in known})

    def forward(self, waveforms: Tensor) -> Tensor:
        """(batch, samples) at 16 kHz to (batch, dimensions)."""
        normal = torch.stack([F.layer_norm(waveform, waveform.shape) for waveform in waveforms])
        output = self.wavlm(normal, output_hidden_states=True)
        # The inputs of all blocks, and the encoder's output after its norm, which some versions leave out of the list.
        layers = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])
        shares = self.feature_weight.softmax(dim=-1)
        hidden = torch.einsum("l,lbtc->bct", shares, layers) + _EPSILON
        hidden = self.layer1(self.instance_norm(hidden))
        blocks = []
        for block in (self.layer2, self.layer3, self.layer4):
            hidden = block(hidden)
            blocks.append(hidden)
        return self.linear(self.bn(self.pooling(F.relu(self.conv(torch.cat(blocks, dim=1))))))


class ConvReluNorm(nn.Module):
    """Convolution, ReLU, batch norm, in this order."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=padding)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.bn(F.relu(self.conv(hidden)))


class Res2Block(nn.Module):
    """ECAPA's SE-Res2Block."""

    def __init__(self, channels: int, dilation: int, bottleneck: int) -> None:
        super().__init__()
        self.Conv1dReluBn1 = ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = Res2Conv(channels, dilation)
        self.Conv1dReluBn2 = ConvReluNorm(channels, channels)
        self.SE_Connect = SqueezeExcitation(channels, bottleneck)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(hidden)))
        return hidden + self.SE_Connect(inner)


class Res2Conv(nn.Module):
    """Eight groups of channels: each but the last is convolved, after adding the previous one's result."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // _SCALE
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(_SCALE - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(_SCALE - 1))

    def forward(self, hidden: Tensor) -> Tensor:
        *groups, last = hidden.chunk(_SCALE, dim=1)
        outputs: list[Tensor] = []
        for group, conv, norm in zip(groups, self.convs, self.bns, strict=True):
            outputs.append(norm(F.relu(conv(group + outputs[-1] if outputs else group))))
        return torch.cat([*outputs, last], dim=1)


class SqueezeExcitation(nn.Module):
    """Scales channels by a function of their means."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        gates = torch.sigmoid(self.linear2(F.relu(self.linear1(hidden.mean(dim=2)))))
        return hidden * gates[..., None]


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted by attention: (batch, channels, time) to (batch, 2 channels)."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(channels, bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        attention = self.linear2(torch.tanh(self.linear1(hidden))).softmax(dim=2)
        mean = (attention * hidden).sum(dim=2)
        variance = (attention * hidden.square()).sum(dim=2) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)


def _wavlm_config(weights: Weights) -> WavLMConfig:
    """Sizes and settings of WavLM-Large's family: layer norms before the blocks and in the feature encoder."""
    layers = _count(weights, r"encoder\.layers\.(\d+)\.")
    convolutions = _count(weights, r"conv_layers\.(\d+)\.")
    kernels = [
        weights[f"{_WAVLM}feature_extractor.conv_layers.{number}.0.weight"] for number in range(convolutions)
    ]
    first = f"{_WAVLM}encoder.layers.0."
    width = len(weights[first + "self_attn.q_proj.weight"])
    buckets, heads = weights[first + "self_attn.relative_attention_bias.weight"].shape
    position = weights[f"{_WAVLM}encoder.pos_conv.0.weight_v"]
    return WavLMConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=len(weights[first + "fc1.weight"]),
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_dim=[len(kernel) for kernel in kernels],
        conv_kernel=[kernel.shape[2] for kernel in kernels],
        conv_stride=[5] + [2] * (convolutions - 1),
        conv_bias=False,
        num_conv_pos_embeddings=position.shape[2],
        num_conv_pos_embedding_groups=width // position.shape[1],
        num_buckets=buckets,
        max_bucket_distance=800,
        mask_time_prob=0.0,
    )


def _count(weights: Weights, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in weights if (match := re.search(pattern, name))), default=-1)


_RENAMED = (
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^mask_emb$", "masked_spec_embed"),
    (r"(conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"(conv_layers\.\d+)\.2\.1\.", r"\1.layer_norm."),
    (r"pos_conv\.0\.weight_g$", "pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"pos_conv\.0\.weight_v$", "pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"pos_conv\.0\.", "pos_conv_embed.conv."),
    (r"self_attn_layer_norm\.", "layer_norm."),
    (r"self_attn\.grep_linear\.", "attention.gru_rel_pos_linear."),
    (r"self_attn\.grep_a$", "attention.gru_rel_pos_const"),
    (r"self_attn\.relative_attention_bias\.", "attention.rel_attn_embed."),
    (r"self_attn\.", "attention."),
    (r"fc1\.", "feed_forward.intermediate_dense."),
    (r"fc2\.", "feed_forward.output_dense."),
)


def _wavlm_weights(weights: Weights) -> dict[str, Tensor]:
    """WavLM's weights under transformers' names."""
    renamed = {}
    for name, value in weights.items():
        if name.startswith(_WAVLM):
            name = name.removeprefix(_WAVLM)
            for pattern, replacement in _RENAMED:
                name = re.sub(pattern, replacement, name)
            renamed[name] = value
    return renamed
