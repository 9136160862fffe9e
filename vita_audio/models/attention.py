"""Attention masks for every attention back end: which position sees which.

A row holds several documents; their position ids restart at 0, and attention stays inside each.
The masks are made once per forward and shared by the backbone and all heads.

For packed rows, ``sdpa`` in transformers builds a dense (time, time) mask: 2,048 tokens in documents of
80 then cost 25 times the attention they need. ``packed_sdpa``, which is registered here and replaces it
when a model is built, batches documents of similar length and runs the plain causal kernel
on each batch. Rows without packing, and generation, use transformers' own ``sdpa``.

FlashAttention takes the ends of the documents instead of a mask. transformers looks for them in every layer again,
which makes the host wait for the device each time, and finds none when a batch has several rows. Here they
are found once for all layers and rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from vita_audio.models.compat import attention_implementation, cache_argument
from vita_audio.models.fused import take_rows

PACKED_SDPA = "packed_sdpa"
FLASH = "flash_attention_2"


def attention_masks(
    config: PreTrainedConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
) -> dict[str, object]:
    """One mask per layer type in the configuration, in the form that the chosen back end expects.

    Args:
        inputs_embeds: (batch, time, d), read for shape, dtype and device only.
        attention_mask: (batch, past + time) of 0 and 1 for padded rows, or None.
        position_ids: (batch, time).
    """
    layer_types = set(config.layer_types)
    masks: dict[str, object] = {}
    if attention_implementation(config) == PACKED_SDPA and attention_mask is None and cache is None:
        documents = group_documents(position_ids.expand(len(inputs_embeds), -1))
        if documents is not None:
            masks["full_attention"] = documents
    if attention_implementation(config) == FLASH and attention_mask is None and cache is None:
        ends = find_documents(position_ids.expand(len(inputs_embeds), -1))
        masks |= dict.fromkeys(layer_types, ends)
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    for layer_type in layer_types - set(masks):
        masks[layer_type] = makers[layer_type](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_argument(cache),
        )
    return masks


def document_ids(position_ids: Tensor) -> Tensor:
    """Number the documents of each row. (batch, time) positions -> (batch, time) ids 0, 0, 1, 1, …"""
    return pad(document_breaks(position_ids).cumsum(dim=1), (1, 0))


def document_breaks(position_ids: Tensor) -> Tensor:
    """Where the next position id is not the current one plus 1. (batch, time) -> (batch, time - 1) bool."""
    return position_ids[:, 1:] != position_ids[:, :-1] + 1


def is_packed(position_ids: Tensor | None, attention_mask: object | None) -> bool:
    """Whether some row holds several documents. An attention mask means padding, not packing."""
    return position_ids is not None and attention_mask is None and bool(document_breaks(position_ids).any())


@dataclass(frozen=True)
class DocumentEnds:
    """The documents of all rows one after the other, as FlashAttention takes them; in the place of a mask.

    Attributes:
        cumulative: (documents + 1,) int32, 0 and the end of each document in the flattened batch.
        longest: tokens in the longest document.
    """

    cumulative: Tensor
    longest: int


def find_documents(position_ids: Tensor) -> DocumentEnds:
    """The documents of rows (batch, time); a row's end also ends a document. Waits for the device."""
    is_start = pad(document_breaks(position_ids), (1, 0), value=True).flatten()
    ends = pad(is_start.nonzero().squeeze(1), (0, 1), value=position_ids.numel())
    return DocumentEnds(ends.to(torch.int32), int(ends.diff().max()))


def packed_flash_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentEnds | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' FlashAttention-2, told where the documents end."""
    if isinstance(attention_mask, DocumentEnds):
        ends, attention_mask = attention_mask, None
        kwargs |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends.cumulative)
        kwargs |= dict.fromkeys(("max_length_q", "max_length_k"), ends.longest)
    result: tuple[Tensor, None] = flash_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


@dataclass(frozen=True)
class PackedDocuments:
    """The documents of all rows, batched by length; takes the place of a mask.

    Attributes:
        groups: for each batch the flat positions (documents, longest) in row-major (batch, time) order;
            documents are padded by repeating their first position.
        restore: (batch * time,) index of each flat position in the concatenated groups.
    """

    groups: list[Tensor]
    restore: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """The concatenated groups, (batch * time + padding,)."""
        return torch.cat([group.flatten() for group in self.groups])


def group_documents(position_ids: Tensor) -> PackedDocuments | None:
    """Batch documents whose lengths share a power of two; None when each row is one document.

    At most log2(time) batches, of which less than half is padding.
    """
    batch, time = position_ids.shape
    is_start = pad(document_breaks(position_ids), (1, 0), value=True).flatten()
    starts = is_start.nonzero().squeeze(1)
    if len(starts) == batch:
        return None
    lengths = starts.diff(append=starts.new_tensor([batch * time]))
    sizes = (2 * lengths - 1).log2().floor()
    groups: list[Tensor] = []
    restore, laid = torch.empty_like(is_start, dtype=torch.long), 0
    for size in sizes.unique():
        chosen = sizes == size
        start, length = starts[chosen, None], lengths[chosen, None]
        offsets = torch.arange(int(length.max()), device=starts.device)
        inside = offsets < length
        positions = torch.where(inside, start + offsets, start)
        restore[positions[inside]] = laid + inside.flatten().nonzero().squeeze(1)
        groups.append(positions)
        laid += positions.numel()
    return PackedDocuments(groups, restore)


def packed_sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedDocuments | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with transformers' interface: (batch, heads, time, d) in, (batch, time, heads, d) out."""
    documents = attention_mask
    if not isinstance(documents, PackedDocuments):
        return sdpa_attention_forward(module, query, key, value, documents, **kwargs)
    batch, _, time, _ = query.shape
    sizes = [group.numel() for group in documents.groups]
    laid = [
        _LayOut.apply(states.transpose(1, 2).flatten(0, 1), documents.positions, documents.restore).split(
            sizes
        )
        for states in (query, key, value)
    ]
    outputs = []
    for group, *grouped in zip(documents.groups, *laid, strict=True):
        grouped_query, grouped_key, grouped_value = (
            states.unflatten(0, group.shape).transpose(1, 2) for states in grouped
        )
        output, _ = sdpa_attention_forward(
            module, grouped_query, grouped_key, grouped_value, None, is_causal=True, **kwargs
        )
        outputs.append(output.flatten(0, 1))
    together = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return take_rows(together, documents.restore).unflatten(0, (batch, time)), None


class _LayOut(torch.autograd.Function):
    """Rows in the order of the groups, padding included. (tokens, heads, d) -> (positions, heads, d)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, positions: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return states.index_select(0, positions)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Padding has no gradient: it comes after its document, which is causal, and its own output is dropped. So each
        # token takes the gradient of its one place, where autograd would add up all places one by one.
        (restore,) = ctx.saved_tensors
        return grad.index_select(0, restore), None, None


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention)
AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
AttentionInterface.register(FLASH, packed_flash_attention)
