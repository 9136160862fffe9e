"""The memory of one forward and backward pass, found by running the model's own code on tensors without data.

torch's fake tensors have shapes, types and storages, but no bytes. A pass over them runs every operation that
training runs, checkpointing and its recomputation included, in seconds and in no memory, also for 7B. The
storages that are alive are added up after every operation; the largest sum is the peak.

What is found this way is activations, recomputed layers, the loss with its chunk of logits, and gradients on their
way; weights and optimizer states are added by :mod:`vita_audio.training.planner`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
)
from vita_audio.models.attention import PackedDocuments
from vita_audio.models.compat import enable_checkpointing
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.recomputation import recompute_first
from vita_audio.training.stages import apply_stage


@dataclass(frozen=True)
class Batch:
    """What a rank computes at once.

    Attributes:
        rows: packed rows.
        length: tokens in a row.
        document: tokens in each document of a row.
        supervised: share of the tokens that are learnt.
    """

    rows: int = 1
    length: int = 8192
    document: int = 512
    supervised: float = 0.5

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length

    @property
    def documents(self) -> list[int]:
        """Lengths of the documents of one row; the last may be shorter."""
        whole, rest = divmod(self.length, min(self.document, self.length))
        return [min(self.document, self.length)] * whole + [rest] * (rest > 0)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that are learnt, in all rows."""
        return round(self.tokens * self.supervised)


def step_memory(
    config: Qwen2MTPConfig,
    batch: Batch,
    *,
    language_model_freeze: bool,
    audio_model_freeze: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    checkpointed_layers: int | None = None,
    held_gradient: float = 1.0,
    earlier_gradients: bool = False,
    chunk_logits: int | None = None,
    lora: LoraArguments | None = None,
) -> tuple[int, int]:
    """Bytes of a forward and backward pass above the weights.

    Args:
        checkpointed_layers: how many layers recompute their activations, the first ones. None: all.
        held_gradient: share of each gradient that this rank keeps (one over the ranks with ZeRO-2).
        earlier_gradients: the pass adds to gradients that are there already, as in accumulation.
        chunk_logits: see :class:`vita_audio.models.loss.LanguageModelHead`.
        lora: options of the adapters. None: no LoRA.

    Returns:
        The peak, and the part of it that are gradients kept for the optimizer.
    """
    config = type(config)(**{**config.to_dict(), "attn_implementation": "sdpa"})
    with FakeTensorMode():
        model = _build(config, dtype)
        apply_stage(model, language_model_freeze=language_model_freeze, audio_model_freeze=audio_model_freeze)
        if lora is not None:
            _adapt(model, lora)
        model.lm_head.chunk_logits = chunk_logits
        enable_checkpointing(model.model)
        if checkpointed_layers is not None:
            recompute_first(model, checkpointed_layers)
        memory = _LiveBytes()
        memory.keep(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = round(held_gradient * sum(parameter.nbytes for parameter in trained))
        _hold_gradients(trained, memory, 0.0 if earlier_gradients else held_gradient)
        if earlier_gradients:
            memory.add(gradients)
        with memory:
            _pass(model, batch).backward()
    return memory.peak, gradients


def _build(config: Qwen2MTPConfig, dtype: torch.dtype) -> Any:
    """The model, by its class: transformers' ``from_config`` would partition it in a run with ZeRO-3."""
    plus = isinstance(config, Qwen2MTPSenseVoiceConfig)
    model_class = Qwen2MTPSenseVoiceForCausalLM if plus else Qwen2MTPForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = model_class(config).train()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def _adapt(model: Any, lora: LoraArguments) -> None:
    """Put adapters into a model of tensors without data."""
    from vita_audio.training import lora as adapters  # PEFT takes seconds to import

    # PEFT moves new adapters to their layer, which tensors without data do not support. On meta it leaves them.
    with torch.device("meta"):
        adapters.insert_adapters(model, lora)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=model.dtype)
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))


def _hold_gradients(parameters: list[nn.Parameter], memory: _LiveBytes, share: float) -> None:
    """Gradients leave as soon as they are complete, as under ZeRO; a share of each stays."""

    def leave(parameter: Tensor) -> None:
        parameter.grad = None
        memory.add(round(share * parameter.nbytes))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(leave)


def _pass(model: Any, batch: Batch) -> Tensor:
    """The loss of a batch. As in the model's ``forward``, but for the choices that depend on the data."""
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    positions = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    masks: dict[str, object] = {"full_attention": _documents(batch)}
    heads_only = model.has_frozen_backbone
    with torch.set_grad_enabled(not heads_only):
        hidden = model.model(
            inputs_embeds=model.embed_inputs(ids),
            position_ids=positions,
            attention_mask=masks,
            use_cache=False,
        ).last_hidden_state
    states = [] if heads_only else [hidden]
    if model.config.num_nextn_predict_layers:
        states += model.head_states(ids, hidden, positions, masks)
    places = torch.arange(batch.supervised_tokens)
    rows = torch.cat([state.flatten(0, 1)[places] for state in states])
    targets = torch.zeros(len(rows), dtype=torch.long)
    loss, *_ = model.lm_head(rows, targets, torch.zeros(len(rows)))
    return loss


def _documents(batch: Batch) -> PackedDocuments | None:
    """The documents by length, as :func:`vita_audio.models.attention.group_documents` groups them."""
    lengths = batch.documents * batch.rows
    if len(lengths) == batch.rows:
        return None
    groups = [torch.zeros(lengths.count(size), size, dtype=torch.long) for size in sorted(set(lengths))]
    return PackedDocuments(groups, torch.zeros(batch.tokens, dtype=torch.long))


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations have made and nobody has freed.

    Attributes:
        peak: the largest sum so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def keep(self, model: nn.Module) -> None:
        """Leave out what a model holds."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = 0

    def add(self, size: int) -> None:
        """Count bytes that no operation of the pass makes."""
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._free, size)
        self.add(size)

    def _free(self, size: int) -> None:
        self.live -= size
