"""Generation in rounds: one backbone pass over what it has not seen, then the heads.

A schedule such as [1, 10, 4, 10] says how many tokens the backbone and then the heads emit, in
turn; the last pair repeats for ever (paper section 3.4; SPEC "Generation"). Every emitted token
passes the logits processors, the streamer and the stopping criteria one by one, whoever made it.

Caches belong to the caller: :class:`~vita_audio.models.cache.MCTPCache` holds the backbone's keys and values
and what each head has seen, so that a conversation can go on from it. The module itself keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, cycle

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from vita_audio.constants import INFERENCE_MODES
from vita_audio.models.attention import attention_masks
from vita_audio.models.cache import CACHE, HeadCache, MCTPCache, cache_length

BACKBONE = -1
"""In a sequence of steps: the token comes from the backbone, not from a head 0, 1, …"""


class MTPGenerationMixin:
    """``generate()`` with a schedule, for a model with ``model``, ``lm_head`` and ``heads``."""

    embedding_inputs: tuple[str, ...] = ()
    """Names of inputs, besides the token ids, that :meth:`embed_inputs` takes. Used in the prefill only."""

    def embed_inputs(self, input_ids: Tensor) -> Tensor:
        """Backbone input of a prompt, (batch, time) -> (batch, time, d)."""
        return self.get_input_embeddings()(input_ids)

    def generate(self, inputs=None, generation_config=None, *args, mtp_inference_mode=None, **kwargs):
        """transformers' ``generate`` with all its arguments, plus the schedule.

        Args:
            inputs: (batch, time) prompt ids, padded on the left.
            mtp_inference_mode: [M1, m1, M2, m2, …]: M1 tokens from the backbone, then m1 from the
                heads, and so on; the last pair repeats. A name (vanilla, balance, boost, turbo) is
                accepted. Default: that of the generation config, else the backbone alone.

        Raises:
            ValueError: the schedule is malformed, or asks for heads in a mode (beam search, assisted
                decoding) that must be able to take tokens back, or with a prefill in chunks.
        """
        if mtp_inference_mode is not None:
            kwargs["mtp_inference_mode"] = mtp_inference_mode
        return super().generate(inputs, generation_config, *args, **kwargs)

    def set_default_mode(self, mode: Sequence[int] | str) -> None:
        """The schedule of ``generate()`` where none is given; saved with the model.

        Raises:
            ValueError: the schedule is malformed.
        """
        self.generation_config.mtp_inference_mode = check_mode(mode)
        # Of a config that says it was made from the model's, transformers loads no field of ours.
        self.generation_config._from_model_config = False

    def _prepare_generation_config(self, generation_config, **kwargs):
        mode = kwargs.pop("mtp_inference_mode", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if mode is None:
            mode = getattr(generation_config, "mtp_inference_mode", None)
        generation_config.mtp_inference_mode = check_mode("vanilla" if mode is None else mode)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        if not self._uses_heads(generation_config):
            return
        if generation_mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"mtp_inference_mode={generation_config.mtp_inference_mode} emits tokens from heads, which works with "
                f"greedy search and sampling, not {generation_mode.value}; pass mtp_inference_mode=[8192, 0] for that"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: heads read the prompt whole; leave it out "
                "or pass mtp_inference_mode=[8192, 0]"
            )

    def _uses_heads(self, generation_config) -> bool:
        return self.config.num_nextn_predict_layers > 0 and any(generation_config.mtp_inference_mode[1::2])

    def prepare_inputs_for_generation(
        self, input_ids, *args, is_first_iteration=False, inputs_embeds=None, **kwargs
    ):
        """As in transformers; further inputs are passed on when the prompt itself is embedded.

        transformers reads from this signature that prompts may come as ``inputs_embeds``.
        """
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {key: value for key, value in kwargs.items() if key not in self.embedding_inputs}
        return super().prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """transformers calls this for greedy search and sampling; schedules without heads are its own business."""
        keeps_heads = isinstance(model_kwargs.get(CACHE), MCTPCache)
        if not self._uses_heads(generation_config) and not keeps_heads:
            return super()._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        return decode_in_rounds(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )


def check_mode(mode: Sequence[int] | str) -> list[int]:
    """The schedule as a list.

    Raises:
        ValueError: not pairs of M >= 1 and m >= 0.
    """
    if isinstance(mode, str):
        if mode.lower() not in INFERENCE_MODES:
            raise ValueError(f"mtp_inference_mode={mode!r}: the known names are {', '.join(INFERENCE_MODES)}")
        mode = INFERENCE_MODES[mode.lower()]
    mode = list(mode)
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in mode)
    if not mode or len(mode) % 2 or not whole or min(mode[0::2]) < 1 or min(mode[1::2]) < 0:
        raise ValueError(
            f"mtp_inference_mode={mode}: give pairs M, m of whole numbers, M >= 1 tokens from the backbone and then "
            "m >= 0 from the heads, for example [1, 10, 4, 10]"
        )
    return mode


def schedule_steps(mode: Sequence[int], num_heads: int) -> Iterator[int]:
    """Who emits each token: BACKBONE or the index of a head, for ever.

    A run of head steps that outlasts the heads falls back to the backbone for one token and goes on
    with head 0.
    """
    pairs = list(zip(mode[0::2], mode[1::2], strict=True))
    for backbone_steps, head_steps in chain(pairs, cycle(pairs[-1:])):
        yield from [BACKBONE] * backbone_steps
        for step in range(head_steps):
            head = step % (num_heads + 1)
            yield BACKBONE if head == num_heads else head


class Rounds:
    """Runs single steps of a schedule over growing rows, with or without caches.

    The rows (token ids, mask) are passed to every step; caches and positions live here.

    Args:
        position_ids: (batch, time) of the prompt; what is generated counts on from there.
        prompt_embeds: (batch, time, d), the prompt's backbone inputs where they are not plain embeddings.
    """

    def __init__(
        self,
        model,
        backbone_cache: Cache | None,
        head_caches: list[HeadCache],
        position_ids: Tensor,
        prompt_embeds: Tensor | None,
    ):
        config = model.config
        self.model = model
        self.heads = model.heads
        self.head_layer_types = config.layer_types[config.num_backbone_layers :]
        self.backbone_cache = backbone_cache
        self.head_caches = head_caches
        self.position_ids = position_ids
        self.prompt_embeds = prompt_embeds
        # What the heads of a round share, and the positions (seen, new) that it is for.
        self.shared_for: tuple[int, int] | None = None
        self.masks: dict[str, object] = {}
        self.rotary: tuple[Tensor, ...] = ()

    def positions(self, start: int, stop: int) -> Tensor:
        """Position ids (batch, stop - start) of places in the row, also of places not yet filled."""
        known = self.position_ids.shape[1]
        if stop > known:  # up to twice as far, to grow rarely
            ahead = torch.arange(1, 2 * stop - known, device=self.position_ids.device)
            self.position_ids = torch.cat([self.position_ids, self.position_ids[:, -1:] + ahead], dim=1)
        return self.position_ids[:, start:stop]

    def backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, **outputs
    ) -> tuple[Tensor, BaseModelOutputWithPast]:
        """Run all tokens not yet seen: the last one's hidden state (batch, d), and the backbone's whole output."""
        cached = self.backbone_cache is not None
        seen = cache_length(self.backbone_cache)
        embeds = self.embed(input_ids, seen)
        result = self.model.model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=self.positions(seen, input_ids.shape[1]),
            cache=self.backbone_cache,
            use_cache=cached,
            **outputs,
        )
        if not cached:
            # The whole sequence was recomputed, so the heads start over as well.
            self.head_caches = [HeadCache() for _ in self.head_caches]
        if self.head_caches:
            self.head_caches[0].add(result.last_hidden_state)
        return result.last_hidden_state[:, -1], result

    def embed(self, input_ids: Tensor, seen: int) -> Tensor:
        """Backbone inputs of the tokens from ``seen`` on: the prompt's own embeddings, then plain ones."""
        prompt = 0 if self.prompt_embeds is None else self.prompt_embeds.shape[1]
        new = self.model.get_input_embeddings()(input_ids[:, max(seen, prompt) :])
        if seen >= prompt:
            return new
        return torch.cat([self.prompt_embeds[:, seen:].to(new.dtype), new], dim=1)

    def head(self, index: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden state (batch, d) of head ``index`` at its last position, after it has caught up."""
        cache = self.head_caches[index]
        hidden = cache.take()
        seen, new = cache.get_seq_length(), hidden.shape[1]
        if self.shared_for != (seen, new):
            # Mostly the heads of a round catch up on the same positions, each reading one token further on.
            self.shared_for = seen, new
            self.share(seen, hidden, attention_mask, cache)
        first = seen + index + 1
        output = self.heads[index](
            self.model.get_input_embeddings()(input_ids[:, first : first + new]),
            hidden,
            attention_mask=self.masks[self.head_layer_types[index]],
            position_embeddings=tuple(part[:, index : index + new] for part in self.rotary),
            position_ids=self.positions(first, first + new),
            use_cache=True,
            **{CACHE: cache},
        )
        if index + 1 < len(self.head_caches):
            self.head_caches[index + 1].add(output)
        return output[:, -1]

    def share(self, seen: int, hidden: Tensor, attention_mask: Tensor | None, cache: HeadCache) -> None:
        """Masks, and rotary embeddings of the places that any head reads, for ``hidden`` (batch, new, d).

        Rotary embeddings that change with the largest position (dynamic, longrope) change up to K places early.
        """
        new = hidden.shape[1]
        if attention_mask is not None:
            attention_mask = attention_mask[:, : seen + new]
        positions = self.positions(seen + 1, seen + new + len(self.heads))
        self.masks = attention_masks(self.model.config, hidden, attention_mask, cache, positions[:, :new])
        self.rotary = self.model.model.rotary_emb(hidden, positions)


def decode_in_rounds(
    model,
    input_ids: Tensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus: bool,
    streamer,
    **model_kwargs,
) -> GenerateDecoderOnlyOutput | Tensor:
    """The decoding loop: as transformers' ``_sample``, but the schedule says who makes each token.

    Args:
        input_ids: (batch, time), left-padded; the whole sequence also when a cache holds part of it.

    Returns:
        (batch, time + new) token ids, or GenerateDecoderOnlyOutput.
    """
    config = generation_config
    mode = config.mtp_inference_mode
    num_heads = model.config.num_nextn_predict_layers
    rounds = prepare_rounds(model, input_ids, min(max(mode[1::2]), num_heads) - 1, model_kwargs)
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None and attention_mask.all():
        attention_mask = None  # nothing is padded: causal kernels need no mask
    captured = {
        name: True for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)
    }
    record = dict.fromkeys(("scores", "logits", "attentions", "hidden_states"), ())
    wanted = {name for name in record if config.return_dict_in_generate and getattr(config, f"output_{name}")}

    pad_token_id = config._pad_token_tensor
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    final_length = None
    for step in schedule_steps(mode, num_heads):
        if step == BACKBONE:
            hidden, outputs = rounds.backbone(input_ids, attention_mask, **captured)
        else:
            hidden, outputs = rounds.head(step, input_ids, attention_mask), None
        logits = model.lm_head(hidden).float()
        scores = logits_processor(input_ids, logits)
        if final_length is None:
            made = {
                "scores": scores,
                "logits": logits,
                # Heads have no layers to show: their steps add empty entries.
                "attentions": () if outputs is None else outputs.attentions,
                "hidden_states": () if outputs is None else outputs.hidden_states,
            }
            record = {name: (*record[name], made[name]) for name in wanted}

        if config.do_sample:
            next_tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
        else:
            next_tokens = scores.argmax(dim=-1)
        if stops_at_eos:
            next_tokens = next_tokens.where(unfinished.bool(), pad_token_id)
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=1)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        if final_length is None:
            if streamer is not None:
                streamer.put(next_tokens.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, record.get("scores"))
            if not unfinished.any():
                final_length = input_ids.shape[1]
        # With ZeRO-3 on several ranks, those that are done keep the others' collectives company.
        if not model._has_unfinished_sequences(
            final_length is not None, synced_gpus, device=input_ids.device
        ):
            break

    if streamer is not None:
        streamer.end()
    input_ids = input_ids[:, :final_length]
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: rounds.backbone_cache}, **record)


def prepare_rounds(model, input_ids: Tensor, last_head: int, model_kwargs: dict) -> Rounds:
    """Caches and prompt embeddings for :func:`decode_in_rounds`.

    Raises:
        ValueError: the prompt came as embeddings without its token ids, or the given cache does not know
            what the heads have seen.
    """
    cache = model_kwargs.get(CACHE) if model_kwargs.get("use_cache", True) else None
    if isinstance(cache, MCTPCache):
        head_caches = cache.heads
    else:
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{CACHE}: a {type(cache).__name__} knows nothing of the heads; pass an "
                "MCTPCache(model.config) that an earlier generate() call filled, or mtp_inference_mode=[8192, 0]"
            )
        head_caches = [HeadCache() for _ in range(last_head + 1)]
    prompt_embeds = model_kwargs.get("inputs_embeds")
    if prompt_embeds is not None and prompt_embeds.shape[1] != input_ids.shape[1]:
        raise ValueError(
            "inputs_embeds: pass input_ids of the same length too, the heads read plain token embeddings"
        )
    extra = {
        name: model_kwargs[name] for name in model.embedding_inputs if model_kwargs.get(name) is not None
    }
    if prompt_embeds is None and extra:
        prompt_embeds = model.embed_inputs(input_ids, **extra)
    return Rounds(model, cache, head_caches, model_kwargs["position_ids"], prompt_embeds)
