"""Which position may see which, for every attention back end.

A row holds several documents; their position ids restart at 0, and attention stays inside each.
The masks are made once per forward and shared by the backbone and all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def document_ids(position_ids: Tensor) -> Tensor:
    """Number the documents of each row. (batch, time) positions -> (batch, time) ids 0, 0, 1, 1, …

    A document ends where the next position is not the following one.
    """
    breaks = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return torch.nn.functional.pad(breaks.cumsum(dim=1), (1, 0))


def is_packed(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    """Whether some row holds several documents. An attention mask says padding, not packing."""
    if position_ids is None or attention_mask is not None:
        return False
    return bool((position_ids[:, 1:] != position_ids[:, :-1] + 1).any())


def attention_masks(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor,
) -> dict[str, object]:
    """One mask per layer type in the configuration, in the form the chosen back end takes.

    Args:
        inputs_embeds: (batch, time, d), read for shape, dtype and device only.
        attention_mask: (batch, past + time) of 0 and 1 for padded rows, or None.
        position_ids: (batch, time).
    """
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {
        layer_type: makers[layer_type](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for layer_type in set(config.layer_types)
    }
