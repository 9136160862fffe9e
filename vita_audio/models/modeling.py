"""Qwen2 with cross-modal token prediction heads, for transformers.

Every module has its released name, so checkpoints need no key mapping: the layers of
the heads follow the backbone's in ``model.layers`` (head k at ``model.layers.{L+k}``), and
``mtp_projs.k``, ``mtp_embed_norms.k`` and ``mtp_hidden_norms.k`` are siblings of ``lm_head``.
Everything is checked against tests/goldens/mctp (SPEC.md there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2ForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.utils import can_return_tuple

from vita_audio.constants import IGNORE_INDEX
from vita_audio.models.attention import PACKED_SDPA, attention_masks, document_ids, is_packed
from vita_audio.models.cache import MCTPCache, cache_length
from vita_audio.models.compat import (
    CACHE,
    attention_implementation,
    backbone_forward,
    cache_argument,
    checkpointing_function,
    keep_initialized_mark,
    recorded_outputs,
    set_attention_implementation,
)
from vita_audio.models.configuration import Qwen2MTPConfig
from vita_audio.models.fused import RMSNorm, take_rows, use_fused_norms
from vita_audio.models.generation import MTPGenerationMixin
from vita_audio.models.loss import LanguageModelHead, shifted_targets
from vita_audio.models.mctp import MCTPHead, run_cascade


class Predictions(NamedTuple):
    """Every supervised prediction of a batch, without gradient; all of shape (predictions,).

    Attributes:
        head: 0 for the backbone, k + 1 for head k.
        position: of the predicting token, in the flattened batch (batch * time).
        loss: its cross-entropy, in nats.
        hit: whether the target has the highest logit.
    """

    head: Tensor
    position: Tensor
    loss: Tensor
    hit: Tensor


@dataclass
class MTPOutput(CausalLMOutputWithPast):
    """Output of the causal LM.

    ``loss`` is what training minimises. ``main_loss`` (scalar, None with a frozen LM) and
    ``mtp_losses`` (K,) are its parts, without gradient, for logging; ``predictions`` on request.
    """

    main_loss: torch.Tensor | None = None
    mtp_losses: torch.Tensor | None = None
    predictions: Predictions | None = None


class Qwen2MTPModel(Qwen2Model):
    """Token embedding, all decoder layers and final norm; ``forward`` runs the backbone only."""

    config: Qwen2MTPConfig
    config_class = Qwen2MTPConfig
    _can_record_outputs = recorded_outputs("num_backbone_layers")

    def __init__(self, config: Qwen2MTPConfig) -> None:
        super().__init__(config)
        use_fused_norms(self)
        if attention_implementation(config) == "sdpa":
            set_attention_implementation(config, PACKED_SDPA)

    @backbone_forward
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, object] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Backbone pass; ``last_hidden_state`` (batch, time, d) is h^0, after the final norm.

        Args as for Qwen2Model; ``attention_mask`` may be the dict of ready masks, and ``past_key_values`` is
        the older name of ``cache``.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds`` was given, or it holds no positions.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.shape[1] == 0:
            raise ValueError(
                f"no new positions: the cache already holds {cache_length(cache)}; pass a longer prompt, or "
                "shorten the cache with cache.crop(-n)"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.positions(inputs_embeds, cache)
        masks = (
            attention_mask
            if isinstance(attention_mask, dict)
            else attention_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        )

        hidden = inputs_embeds
        position_embeddings = self.rotary_emb(hidden, position_ids)
        for index in range(self.config.num_backbone_layers):
            hidden = self.layers[index](
                hidden,
                attention_mask=masks[self.config.layer_type(index)],
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **cache_argument(cache),
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), **cache_argument(cache if use_cache else None)
        )

    def positions(self, inputs_embeds: Tensor, cache: Cache | None = None) -> Tensor:
        """Positions that continue the cache, (1, time)."""
        return torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + cache_length(cache)


class Qwen2MTPForCausalLM(MTPGenerationMixin, Qwen2ForCausalLM):
    """Qwen2ForCausalLM with K heads; see SPEC.md for what it computes.

    Subclasses with further inputs (audio) override :meth:`embed_inputs` and name those inputs in
    ``embedding_inputs``.
    """

    config: Qwen2MTPConfig
    config_class = Qwen2MTPConfig
    accepts_loss_kwargs = True
    """Tells the Trainer to pass num_items_in_batch; the loss is already divided by it."""

    model_class: type[Qwen2MTPModel] = Qwen2MTPModel

    def __init__(self, config: Qwen2MTPConfig) -> None:
        # Not Qwen2ForCausalLM's __init__, which would build a second backbone and head only to drop them.
        PreTrainedModel.__init__(self, config)
        num_heads, d = config.num_nextn_predict_layers, config.hidden_size
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(d, config.vocab_size, bias=False)
        self.mtp_projs = nn.ModuleList(nn.Linear(2 * d, d, bias=False) for _ in range(num_heads))
        self.mtp_embed_norms = nn.ModuleList(RMSNorm(d, config.rms_norm_eps) for _ in range(num_heads))
        self.mtp_hidden_norms = nn.ModuleList(RMSNorm(d, config.rms_norm_eps) for _ in range(num_heads))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, object] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Cache | None = None,
        return_predictions: bool = False,
        **kwargs: Any,
    ) -> MTPOutput:
        """Backbone logits, or, with labels, the training loss over the backbone and all heads.

        Args:
            input_ids: (batch, time).
            attention_mask: (batch, past + time) of 0 and 1 for padded rows. Omit it for packed rows.
            position_ids: (batch, time). A restart marks a new document: attention and
                predictions stay inside each document.
            cache: keys and values of earlier positions; ``past_key_values`` is its older name. An
                :class:`MCTPCache` also takes the hidden states that its heads will need in ``generate``.
            inputs_embeds: (batch, time, d), the backbone's input. Heads always read the plain
                embeddings of ``input_ids``, which labels and K > 0 therefore require.
            labels: (batch, time), not shifted, -100 at unsupervised positions.
            logits_to_keep: number of last positions whose logits are returned (0: all), or their indices.
            num_items_in_batch: divide each loss by this instead of by its own supervised positions.
            return_predictions: with labels, also return the loss of every supervised prediction.

        Returns:
            MTPOutput. ``logits`` (batch, kept, vocabulary) is None in training with labels.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("pass input_ids or inputs_embeds")
            inputs_embeds = self.embed_inputs(
                input_ids, **{name: kwargs.pop(name) for name in self.embedding_inputs if name in kwargs}
            )
        if labels is not None or (cache is None and is_packed(position_ids, attention_mask)):
            use_cache = False
        if position_ids is None:
            position_ids = self.model.positions(inputs_embeds, cache)
        masks = (
            attention_mask
            if isinstance(attention_mask, dict)
            # A cache that does not exist yet changes no mask, and packing is only detected without a cache.
            else attention_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        )

        # A frozen LM (stages 2 and 3) has no loss and gets no gradient, so it needs no graph.
        heads_only = labels is not None and self.has_frozen_backbone
        with torch.set_grad_enabled(torch.is_grad_enabled() and not heads_only):
            outputs = self.model(
                inputs_embeds=inputs_embeds,
                attention_mask=masks,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        hidden = outputs.last_hidden_state
        if isinstance(cache, MCTPCache) and cache.heads:
            cache.heads[0].add(hidden)

        loss = main_loss = mtp_losses = predictions = logits = None
        if labels is not None:
            loss, main_loss, mtp_losses, predictions = self.training_loss(
                input_ids, hidden, labels, position_ids, masks, num_items_in_batch, **kwargs
            )
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        # Indices and tuples follow the order in which fields are set: all at once, in the order of the class.
        return MTPOutput(
            loss=loss,
            logits=logits,
            **cache_argument(outputs.get(CACHE)),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            main_loss=main_loss,
            mtp_losses=mtp_losses,
            predictions=predictions if return_predictions else None,
        )

    def training_loss(
        self,
        input_ids: Tensor | None,
        hidden: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        masks: dict[str, object],
        num_items_in_batch: Tensor | int | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor, Predictions]:
        """loss = CE_main + (mtp_loss_weight / K) sum_k CE_k, without the main term when the LM is frozen.

        Args:
            hidden: (batch, time, d), h^0.
            masks: ready attention masks of the row.

        Returns:
            The loss; and without gradient the main loss or None, the head losses (K,), and all predictions.

        Raises:
            ValueError: the labels were already shifted, or no token ids were given.
        """
        if kwargs.pop("shift_labels", None) is not None:
            raise ValueError("shift_labels: pass labels only; each head shifts them by its own distance")
        num_heads = self.config.num_nextn_predict_layers
        with_main = not self.has_frozen_backbone
        states = [hidden] if with_main else []
        if num_heads:
            states.extend(self.head_states(input_ids, hidden, position_ids, masks, **kwargs))

        documents = document_ids(position_ids).expand_as(labels)
        first_shift = 1 if with_main else 2
        targets = torch.stack(
            [shifted_targets(labels, documents, first_shift + i).flatten() for i in range(len(states))]
        )
        supervised = targets != IGNORE_INDEX
        counts = supervised.sum(dim=1)
        # One transfer to the host for the whole step: all indices, then the end of each term's indices.
        term_of_row, position_of_row = supervised.nonzero(as_tuple=True)
        positions = position_of_row.split(counts.tolist())
        rows = torch.cat(
            [take_rows(state.flatten(0, 1), index) for state, index in zip(states, positions, strict=True)]
        )

        items = counts if num_items_in_batch is None else num_items_in_batch
        means = (1.0 / torch.as_tensor(items, device=rows.device).clamp(min=1)).expand(len(states))
        weights = torch.full_like(means, self.config.mtp_loss_weight / max(num_heads, 1))
        if with_main:
            weights[0] = 1.0
        loss, row_losses, hits = self.lm_head(rows, targets[supervised], (weights * means)[term_of_row])
        losses = torch.zeros_like(means).index_add_(0, term_of_row, row_losses) * means
        predictions = Predictions(term_of_row + first_shift - 1, position_of_row, row_losses, hits)
        return loss, losses[0] if with_main else None, losses[1:] if with_main else losses, predictions

    def head_states(
        self,
        input_ids: Tensor | None,
        hidden: Tensor,
        position_ids: Tensor,
        masks: dict[str, object],
        **kwargs: Any,
    ) -> list[Tensor]:
        """Hidden states h^1 … h^K over whole rows, each (batch, time, d).

        Raises:
            ValueError: no token ids were given, or the head layers have several attention types.
        """
        if input_ids is None:
            raise ValueError(
                "labels with inputs_embeds: also pass input_ids; the heads read plain token embeddings"
            )
        token_embeds = self.get_input_embeddings()(input_ids)
        if self.config.mtp_detach_backbone or self.has_frozen_backbone:
            token_embeds, hidden = token_embeds.detach(), hidden.detach()
            # A reentrant checkpoint gives its parameters no gradient unless one of its inputs requires one.
            hidden.requires_grad_(self.training and checkpointing_function(self.model) is not None)
        first = self.config.num_backbone_layers
        layer_types = [self.config.layer_type(first + k) for k in range(self.config.num_nextn_predict_layers)]
        if len(set(layer_types)) > 1:
            raise ValueError(f"config: all head layers must share one layer type, got {layer_types}")
        return list(
            run_cascade(
                self.heads,
                token_embeds,
                hidden,
                position_ids,
                self.model.rotary_emb,
                attention_mask=masks[layer_types[0]],
                **kwargs,
            )
        )

    @property
    def heads(self) -> list[MCTPHead]:
        """The K heads, as views of this model's modules."""
        first = self.config.num_backbone_layers
        return [
            MCTPHead(
                index=k,
                embed_norm=self.mtp_embed_norms[k],
                hidden_norm=self.mtp_hidden_norms[k],
                proj=cast(nn.Linear, self.mtp_projs[k]),
                layer=self.model.layers[first + k],
                final_norm=self.model.norm,
            )
            for k in range(self.config.num_nextn_predict_layers)
        ]

    @property
    def has_frozen_backbone(self) -> bool:
        """Whether only heads train: there are heads, and the LM head and the first layer are frozen."""
        if self.config.num_nextn_predict_layers == 0 or self.lm_head.weight.requires_grad:
            return False
        # With LoRA the LM head may be frozen, and adapters train in the layers.
        return not any(parameter.requires_grad for parameter in self.model.layers[0].parameters())

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Set an LM head that computes losses; resizing the vocabulary would make it a plain Linear."""
        head = LanguageModelHead(
            new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta"
        )
        head.weight = new_embeddings.weight
        keep_initialized_mark(new_embeddings, head)
        self.lm_head = head
