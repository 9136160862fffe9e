"""Configuration of Qwen2 with cross-modal token prediction heads.

The released files count the heads among the decoder layers: ``num_hidden_layers`` is backbone
plus heads (28 + 10 = 38 at 7B). The field keeps that meaning here, so every released
config.json loads unchanged; code reads ``num_backbone_layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config
from transformers.configuration_utils import PreTrainedConfig

from vita_audio.audio.sensevoice.checkpoint import SenseVoiceEncoderConfig


@strict
class Qwen2MTPConfig(Qwen2Config):
    """Qwen2 with ``num_nextn_predict_layers`` heads (0: a plain Qwen2 under this class).

    Attributes:
        num_nextn_predict_layers: number of heads K. The last K of ``num_hidden_layers`` belong to them.
        mtp_loss_weight: weight of the mean of the head losses in the training loss.
        mtp_detach_backbone: in joint training, keep the heads' gradients out of the backbone and
            the token embeddings. The GLM-4-Voice variant lets them through, the SenseVoice variant
            and the paper's text do not.
        system_prompt: system message of conversations that have none, as in training; "" for no message. None, as in
            the released files: the family's published message.

    Raises:
        ValueError: K is negative, or no backbone layer is left.
    """

    model_type = "qwen2_mtp"

    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float | int = 1.0
    mtp_detach_backbone: bool = False
    system_prompt: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.num_nextn_predict_layers < self.num_hidden_layers:
            raise ValueError(
                f"config: num_nextn_predict_layers={self.num_nextn_predict_layers} must be at least 0 and below "
                f"num_hidden_layers={self.num_hidden_layers}, which counts backbone and head layers together"
            )

    @property
    def num_backbone_layers(self) -> int:
        """Decoder layers of the language model itself."""
        return self.num_hidden_layers - self.num_nextn_predict_layers

    def layer_type(self, index: int) -> str:
        """Attention type of a decoder layer: "full_attention" or "sliding_attention"."""
        assert self.layer_types is not None  # __post_init__ fills it in
        return self.layer_types[index]

    @property
    def continuous_input(self) -> bool:
        """Whether user speech enters as continuous SenseVoice features (the Plus family)."""
        return False

    # transformers sizes a cache by ``num_hidden_layers``. The heads' layers run outside the backbone and keep their
    # keys elsewhere (:class:`~vita_audio.models.cache.HeadCache`). transformers describes such layers as sharing
    # the keys of others: in this property until 5.22, in the next one from 5.23 on.
    @property
    def num_kv_shared_layers(self) -> int:
        """The number of final layers that a backbone's cache leaves out: the heads'."""
        return self.num_nextn_predict_layers

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """For each layer "reuse" if a backbone's cache leaves it out, else None."""
        return [None] * self.num_backbone_layers + ["reuse"] * self.num_nextn_predict_layers


@strict
class Qwen2MTPSenseVoiceConfig(Qwen2MTPConfig):
    """The Plus family: Qwen2 with heads, SenseVoice encoder and adapter.

    Attributes:
        audio_encoder: sizes of the encoder under FunASR's names; defaults to SenseVoiceSmall's.
        mtp_detach_backbone: see :class:`Qwen2MTPConfig`; this family detaches.

    Raises:
        ValueError: the encoder's settings describe another network.
    """

    model_type = "qwen2_mtp_sensevoice"

    mtp_detach_backbone: bool = True
    audio_encoder: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.audio_encoder = SenseVoiceEncoderConfig.from_dict(self.audio_encoder or {}).to_dict()

    @property
    def continuous_input(self) -> bool:
        """See :class:`Qwen2MTPConfig`."""
        return True


def num_positions(config: PreTrainedConfig) -> int:
    """The number of positions that a model can distinguish; rotary scaling extends those that it was trained with."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return max(config.max_position_embeddings, int(trained * (rope.get("factor") or 1)))
