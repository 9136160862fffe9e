"""Generation in rounds: one backbone pass over the unseen tokens, then the heads.

A :class:`~vita_audio.models.schedule.Schedule` determines the source of each token (paper section 3.4; SPEC
"Generation").
Every token passes the logits processors, the streamer and the stopping criteria one by one, whether it comes
from the backbone or from a head. :func:`decode_in_rounds` is the loop, written as a generator: ``generate()`` runs
it to its end, :meth:`MTPGenerationMixin.iterate` yields each token as it is made.

Caches belong to the caller: :class:`~vita_audio.models.cache.MCTPCache` holds the backbone's keys and values
and the state of each head, so a conversation can continue from it. The module itself keeps no state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPast

from vita_audio.models.attention import attention_masks
from vita_audio.models.cache import CACHE, HeadCache, MCTPCache, cache_length, check_continues
from vita_audio.models.compat import (
    GenerationHooks,
    detach_from_model_config,
    has_unfinished_sequences,
    pad_token,
)
from vita_audio.models.configuration import Qwen2MTPConfig
from vita_audio.models.schedule import BACKBONE, Schedule

Result = TypeVar("Result")


class MTPGenerationMixin(GenerationHooks, GenerationMixin):
    """``generate()`` with a schedule, for a model with ``model``, ``lm_head`` and ``heads``."""

    config: Qwen2MTPConfig
    generation_config: Any
    """transformers' GenerationConfig with the added field ``mtp_inference_mode``."""

    embedding_inputs: tuple[str, ...] = ()
    """Names of inputs, besides the token ids, that :meth:`embed_inputs` takes. Used in the prefill only."""

    def embed_inputs(self, input_ids: Tensor) -> Tensor:
        """Backbone input of a prompt, (batch, time) -> (batch, time, d)."""
        return cast(PreTrainedModel, self).get_input_embeddings()(input_ids)

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        mtp_inference_mode: Schedule | Sequence[int] | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate`` with all its arguments, plus the schedule.

        Args:
            inputs: (batch, time) prompt ids, padded on the left.
            mtp_inference_mode: [M1, m1, M2, m2, …]: M1 tokens from the backbone, then m1 from the
                heads, and so on; the last pair repeats. A name (vanilla, balance, boost, turbo) is
                accepted. Defaults to the generation config's, else the backbone alone.

        Raises:
            ValueError: the schedule is malformed, or asks for heads in a mode (beam search, assisted
                decoding) that must be able to discard tokens, or with a prefill in chunks; or the given cache
                holds as many positions as the prompt, or more.
        """
        if mtp_inference_mode is not None:
            kwargs["mtp_inference_mode"] = mtp_inference_mode
        transformers: Any = super()
        return transformers.generate(inputs, generation_config, *args, **kwargs)

    def iterate(
        self, inputs: Tensor, *, generators: Sequence[torch.Generator | None] | None = None, **arguments: Any
    ) -> Generator[Tensor, None, Any]:
        """``generate()``, one token at a time: yields the new token ids, (batch,), as they are made.

        Closing the iterator ends generation at once. A finished row is padded with ``pad_token_id`` until
        all rows have finished.

        Args:
            inputs: (batch, time) prompt ids, padded on the left.
            generators: the source of each row's draws; None: torch's global generator.
            arguments: of :meth:`generate`, but for ``num_return_sequences`` and beams.

        Raises:
            ValueError: see :meth:`generate`.
        """

        def start(model: Any, input_ids: Tensor, **prepared: Any) -> Generator[Tensor, None, Any]:
            return decode_in_rounds(model, input_ids, generators=generators, **prepared)

        return self.generate(inputs, custom_generate=start, **arguments)

    def set_default_mode(self, mode: Schedule | Sequence[int] | str) -> None:
        """Set the default schedule of ``generate()``; it is saved with the model.

        Raises:
            ValueError: the schedule is malformed.
        """
        self.generation_config.mtp_inference_mode = Schedule.parse(mode).numbers
        detach_from_model_config(self.generation_config)

    def read_generation_config(
        self, read: Callable[..., Any], generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        mode = kwargs.pop("mtp_inference_mode", None)
        config, model_kwargs = read(generation_config, **kwargs)
        if mode is None:
            mode = getattr(config, "mtp_inference_mode", None)
        config.mtp_inference_mode = Schedule.parse("vanilla" if mode is None else mode).numbers
        return config, model_kwargs

    def check_generation_mode(self, mode: GenerationMode, generation_config: Any) -> None:
        if not self._uses_heads(generation_config):
            return
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"mtp_inference_mode={generation_config.mtp_inference_mode} emits tokens from heads, which works with "
                f"greedy search and sampling, not {mode.value}; pass mtp_inference_mode=[8192, 0] for that"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size}: heads need a single prefill; omit it "
                "or pass mtp_inference_mode=[8192, 0]"
            )

    def _uses_heads(self, generation_config: Any) -> bool:
        schedule = Schedule.parse(generation_config.mtp_inference_mode)
        return self.config.num_nextn_predict_layers > 0 and schedule.longest_head_run > 0

    def prepare_inputs_for_generation(  # type: ignore[override]  # the rest is passed on by place
        self,
        input_ids: Any,
        *args: Any,
        is_first_iteration: bool = False,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; further inputs are passed on when the prompt itself is embedded.

        From this signature transformers infers that prompts may be given as ``inputs_embeds``.
        """
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs = {key: value for key, value in kwargs.items() if key not in self.embedding_inputs}
        transformers: Any = super()
        return transformers.prepare_inputs_for_generation(
            input_ids, *args, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )

    def decode(self, decode: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Greedy search and sampling. If the schedule uses no heads, transformers' own loop runs."""
        keeps_heads = isinstance(kwargs.get(CACHE), MCTPCache)
        if not self._uses_heads(kwargs["generation_config"]) and not keeps_heads:
            if kwargs.get("inputs_embeds") is None:
                check_continues(kwargs.get(CACHE), input_ids.shape[1])
            return decode(input_ids, *args, **kwargs)
        return last_value(decode_in_rounds(self, input_ids, *args, **kwargs))


class Rounds:
    """Runs single steps of a schedule over growing rows, with or without caches.

    The rows (token ids, mask) are passed to every step; this object holds caches and positions.

    Args:
        position_ids: (batch, time) of the prompt; generated tokens continue from its last position.
        prompt_embeds: (batch, time, d), the prompt's backbone inputs if they are not plain embeddings.
    """

    def __init__(
        self,
        model: Any,
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
        # The values that the heads of a round share, and the positions (seen, new) they belong to.
        self.shared_for: tuple[int, int] | None = None
        self.masks: dict[str, object] = {}
        self.rotary: tuple[Tensor, ...] = ()

    def positions(self, start: int, stop: int) -> Tensor:
        """Position ids (batch, stop - start) of columns of the row, including columns not yet filled."""
        known = self.position_ids.shape[1]
        if stop > known:  # up to twice as far, to grow rarely
            ahead = torch.arange(1, 2 * stop - known, device=self.position_ids.device)
            self.position_ids = torch.cat([self.position_ids, self.position_ids[:, -1:] + ahead], dim=1)
        return self.position_ids[:, start:stop]

    def backbone(
        self, input_ids: Tensor, attention_mask: Tensor | None, **outputs: bool
    ) -> tuple[Tensor, BaseModelOutputWithPast]:
        """Run the unseen tokens. Returns the last hidden state (batch, d) and the backbone's whole output."""
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
        if self.prompt_embeds is None or seen >= prompt:
            return new
        return torch.cat([self.prompt_embeds[:, seen:].to(new.dtype), new], dim=1)

    def head(self, index: int, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Hidden state (batch, d) of head ``index`` at its last position, after it has caught up."""
        cache = self.head_caches[index]
        hidden = cache.take()
        seen, new = cache.get_seq_length(), hidden.shape[1]
        if self.shared_for != (seen, new):
            # The heads of a round usually catch up on the same positions, each reading one token further ahead.
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
        """Masks, and rotary embeddings of every position that a head reads, for ``hidden`` (batch, new, d).

        Rotary embeddings that change with the largest position (dynamic, longrope) change up to K places early.
        """
        new = hidden.shape[1]
        if attention_mask is not None:
            attention_mask = attention_mask[:, : seen + new]
        positions = self.positions(seen + 1, seen + new + len(self.heads))
        self.masks = attention_masks(self.model.config, hidden, attention_mask, cache, positions[:, :new])
        self.rotary = self.model.model.rotary_emb(hidden, positions)


@torch.no_grad()
def decode_in_rounds(
    model: Any,
    input_ids: Tensor,
    logits_processor: Callable[[Tensor, Tensor], Tensor],
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    *,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    generators: Sequence[torch.Generator | None] | None = None,
    **model_kwargs: Any,
) -> Generator[Tensor, None, GenerateDecoderOnlyOutput | Tensor]:
    """The decoding loop: transformers' ``_sample``, except that the schedule determines who makes each token.

    Args:
        input_ids: (batch, time), left-padded; the whole sequence even if a cache holds part of it.
        generators: the source of each row's draws; None: torch's global generator.

    Yields:
        (batch,) token ids from one step.

    Returns:
        (batch, time + new) token ids, or GenerateDecoderOnlyOutput.
    """
    config = generation_config
    schedule = Schedule.parse(config.mtp_inference_mode)
    num_heads = model.config.num_nextn_predict_layers
    rounds = prepare_rounds(model, input_ids, min(schedule.longest_head_run, num_heads), model_kwargs)
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is not None and attention_mask.all():
        attention_mask = None  # nothing is padded: causal kernels need no mask
    captured = {
        name: True for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)
    }
    record: dict[str, tuple[Any, ...]] = dict.fromkeys(
        ("scores", "logits", "attentions", "hidden_states"), ()
    )
    wanted = {name for name in record if config.return_dict_in_generate and getattr(config, f"output_{name}")}

    pad_token_id = pad_token(config)
    stops_at_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    final_length = None
    for step in schedule.steps(num_heads):
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
                # Heads report no layers: their steps add empty entries.
                "attentions": () if outputs is None else outputs.attentions,
                "hidden_states": () if outputs is None else outputs.hidden_states,
            }
            record = {name: (*record[name], made[name]) for name in wanted}

        next_tokens = draw(scores, generators) if config.do_sample else scores.argmax(dim=-1)
        if stops_at_eos and pad_token_id is not None:
            next_tokens = next_tokens.where(unfinished.bool(), pad_token_id)
        input_ids = torch.cat([input_ids, next_tokens[:, None]], dim=1)
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        if final_length is None:
            if streamer is not None:
                streamer.put(next_tokens.cpu())
            yield next_tokens
            unfinished = unfinished & ~stopping_criteria(input_ids, record.get("scores"))
            if not unfinished.any():
                final_length = input_ids.shape[1]
        # With ZeRO-3, a finished rank keeps running until all are finished: the others need its part of the weights.
        if not has_unfinished_sequences(model, final_length is not None, synced_gpus, input_ids.device):
            break

    if streamer is not None:
        streamer.end()
    input_ids = input_ids[:, :final_length]
    if not config.return_dict_in_generate:
        return input_ids
    output: dict[str, Any] = {"sequences": input_ids, CACHE: rounds.backbone_cache, **record}
    return GenerateDecoderOnlyOutput(**output)


def draw(scores: Tensor, generators: Sequence[torch.Generator | None] | None) -> Tensor:
    """Draw one token per row, (batch,), from scores (batch, vocabulary), each row with its own generator."""
    probs = scores.softmax(dim=-1)
    if generators is None:
        return torch.multinomial(probs, num_samples=1).squeeze(1)
    rows = zip(probs, generators, strict=True)
    return torch.cat([torch.multinomial(row, num_samples=1, generator=generator) for row, generator in rows])


def last_value(steps: Generator[Tensor, None, Result]) -> Result:
    """Run a generator to its end and return its return value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def prepare_rounds(model: Any, input_ids: Tensor, num_heads: int, model_kwargs: dict[str, Any]) -> Rounds:
    """Caches and prompt embeddings for :func:`decode_in_rounds`.

    Args:
        num_heads: heads that the schedule uses.

    Raises:
        ValueError: the prompt was given as embeddings without its token ids, or the given cache lacks the
            state of the heads or does not end before the prompt.
    """
    cache = model_kwargs.get(CACHE) if model_kwargs.get("use_cache", True) else None
    if isinstance(cache, MCTPCache):
        head_caches = cache.heads
    else:
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"{CACHE}: a {type(cache).__name__} lacks the state of the heads; pass an "
                "MCTPCache(model.config) that an earlier generate() call filled, or mtp_inference_mode=[8192, 0]"
            )
        head_caches = [HeadCache() for _ in range(num_heads)]
    check_continues(cache, input_ids.shape[1])
    prompt_embeds = model_kwargs.get("inputs_embeds")
    if prompt_embeds is not None and prompt_embeds.shape[1] != input_ids.shape[1]:
        raise ValueError(
            "inputs_embeds: also pass input_ids of the same length; the heads read plain token embeddings"
        )
    extra = {
        name: model_kwargs[name] for name in model.embedding_inputs if model_kwargs.get(name) is not None
    }
    if prompt_embeds is None and extra:
        prompt_embeds = model.embed_inputs(input_ids, **extra)
    return Rounds(model, cache, head_caches, model_kwargs["position_ids"], prompt_embeds)
