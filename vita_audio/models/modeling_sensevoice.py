"""The Plus family: Qwen2 with MCTP heads that hears continuous SenseVoice features.

User speech enters as frames of the SenseVoice frontend. The encoder and a small adapter turn them
into rows that replace the ``<|context_of_audio|>`` embeddings; everything after that is
:class:`~vita_audio.models.modeling.Qwen2MTPForCausalLM`. The heads read plain token embeddings, so
audio reaches them through the backbone's hidden states alone.

Checked against tests/goldens/sensevoice (SPEC.md there, sections 4 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled

from vita_audio.audio.sensevoice.checkpoint import SenseVoiceEncoderConfig
from vita_audio.audio.sensevoice.encoder import NUM_QUERY_FRAMES, SenseVoiceEncoder
from vita_audio.models.configuration import Qwen2MTPSenseVoiceConfig
from vita_audio.models.modeling import MTPOutput, Qwen2MTPForCausalLM, Qwen2MTPModel


class Qwen2MTPSenseVoiceModel(Qwen2MTPModel):
    """The backbone with audio input: an encoder and an adapter next to the decoder layers."""

    config: Qwen2MTPSenseVoiceConfig
    config_class = Qwen2MTPSenseVoiceConfig

    def __init__(self, config: Qwen2MTPSenseVoiceConfig) -> None:
        super().__init__(config)
        self.audio_model = AudioModel(config)
        self.audio_projection = AudioProjection(self.audio_model.model.config.output_size, config.hidden_size)
        self.post_init()

    def encode_audio(self, audios: Sequence[Tensor]) -> Tensor:
        """The embeddings that the backbone reads for speech.

        Args:
            audios: clips of shape (frames, 560) each.

        Returns:
            (sum of frames + 4, d), clip after clip.
        """
        lengths = [len(audio) for audio in audios]
        features = pad_sequence(list(audios), batch_first=True).to(self.embed_tokens.weight.device)
        equal = min(lengths) == max(lengths)
        encoded, _ = self.audio_model(features, None if equal else lengths)
        rows = [item[: length + NUM_QUERY_FRAMES] for item, length in zip(encoded, lengths, strict=True)]
        # The adapter treats each row separately, so padding is cut before it, not after.
        return self.audio_projection(torch.cat(rows))


class Qwen2MTPSenseVoiceForCausalLM(Qwen2MTPForCausalLM):
    """Qwen2MTPForCausalLM whose prompts and training rows may contain audio."""

    config: Qwen2MTPSenseVoiceConfig
    config_class = Qwen2MTPSenseVoiceConfig
    model_class = Qwen2MTPSenseVoiceModel
    embedding_inputs = ("audios", "audio_indices")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        audios: Sequence[Tensor] | None = None,
        audio_indices: Sequence[Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MTPOutput | tuple:
        """As :meth:`Qwen2MTPForCausalLM.forward`, with audio.

        Args:
            audios: clips of the whole batch, (frames, 560) each, from the SenseVoice frontend.
            audio_indices: for each clip the batch rows and positions of its frames + 4 context
                tokens, (2, 1, frames + 4) or (2, frames + 4).

        Raises:
            ValueError: clips and indices do not match.
        """
        if inputs_embeds is None:
            kwargs |= {"audios": audios, "audio_indices": audio_indices}
        elif audios:
            raise ValueError("pass audios with input_ids, not with inputs_embeds, which already hold them")
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )

    def embed_inputs(
        self,
        input_ids: Tensor,
        audios: Sequence[Tensor] | None = None,
        audio_indices: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings with speech in place of its context tokens, (batch, time) -> (batch, time, d).

        Without audio, a frame of ones passes through encoder and adapter and adds zero (SPEC 5.4):
        their parameters stay in every rank's graph, so ranks with and without audio run the same
        collectives and do not deadlock.
        """
        embeds = super().embed_inputs(input_ids)
        if audios:
            rows, positions = gather_indices(audios, audio_indices).to(embeds.device)
            speech = self.model.encode_audio(audios)
            return embeds.index_put((rows, positions), speech.to(embeds.dtype))
        if self.training or is_deepspeed_zero3_enabled():
            silent = embeds.new_ones(1, self.model.audio_model.model.config.input_size)
            return embeds + 0 * self.model.encode_audio([silent]).mean().to(embeds.dtype)
        return embeds

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """See the base class; clips whose tokens a given cache already holds are dropped."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("audios") and inputs.get("input_ids") is not None:
            cached = input_ids.shape[1] - inputs["input_ids"].shape[1]
            clips = zip(inputs["audios"], inputs["audio_indices"], strict=True)
            new = [(audio, places) for audio, places in clips if int(places[1].min()) >= cached]
            inputs["audios"] = [audio for audio, _ in new]
            inputs["audio_indices"] = [torch.stack([places[0], places[1] - cached]) for _, places in new]
        return inputs

    def expand_inputs(
        self,
        expand: Callable[..., Any],
        expand_size: int,
        audios: Sequence[Tensor] | None = None,
        audio_indices: Sequence[Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Several sequences per prompt: row r becomes rows r * size … r * size + size - 1, clips likewise."""
        input_ids, model_kwargs = super().expand_inputs(expand, expand_size, **kwargs)
        if audios:
            model_kwargs["audios"] = [audio for audio in audios for _ in range(expand_size)]
            model_kwargs["audio_indices"] = [
                torch.stack([each[0] * expand_size + copy, each[1]])
                for each in audio_indices or []
                for copy in range(expand_size)
            ]
        return input_ids, model_kwargs


def gather_indices(audios: Sequence[Tensor], audio_indices: Sequence[Tensor] | None) -> Tensor:
    """Batch rows and positions of all clips, (2, sum of frames + 4).

    Raises:
        ValueError: clips and indices differ in number, or a clip's in length.
    """
    indices = audio_indices or []
    if len(indices) != len(audios):
        raise ValueError(
            f"{len(audios)} audios were given with {len(indices)} audio_indices; give one for each"
        )
    for number, (audio, places) in enumerate(zip(audios, indices, strict=True)):
        if places.shape[-1] != len(audio) + NUM_QUERY_FRAMES:
            raise ValueError(
                f"audio_indices[{number}] names {places.shape[-1]} context tokens, but audios[{number}] has "
                f"{len(audio)} frames and needs {len(audio) + NUM_QUERY_FRAMES} (frames + 4)"
            )
    return torch.cat([places.reshape(2, -1) for places in indices], dim=1)


class AudioModel(nn.Module):
    """The encoder under its released name, ``audio_model.model``; in evaluation mode while frozen."""

    def __init__(self, config: Qwen2MTPSenseVoiceConfig) -> None:
        super().__init__()
        self.model = SenseVoiceEncoder(SenseVoiceEncoderConfig.from_dict(config.audio_encoder or {}))

    def train(self, mode: bool = True) -> AudioModel:
        trainable = any(parameter.requires_grad for parameter in self.model.encoder.parameters())
        return super().train(mode and trainable)

    def forward(self, features: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """See :meth:`SenseVoiceEncoder.forward`."""
        return self.model(features, lengths)


class AudioProjection(nn.Module):
    """The adapter: norm, linear, GELU, linear, from the encoder's width to the LLM's (SPEC 4)."""

    def __init__(self, encoder_size: int, hidden_size: int) -> None:
        super().__init__()
        self.pre_proj_layernorm = nn.LayerNorm(encoder_size)
        self.mlp = nn.Sequential(
            nn.Linear(encoder_size, hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size, bias=False),
        )

    def forward(self, encoded: Tensor) -> Tensor:
        """(…, encoder_size) to (…, hidden_size)."""
        return self.mlp(self.pre_proj_layernorm(encoded))
