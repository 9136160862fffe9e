"""Private and changing names of transformers and DeepSpeed, in one place.

Both libraries change such names between minor releases. Each is used once, here, under our own name and with
a sentence that explains why it is needed. ``tests/models/test_compat.py`` holds a contract for each: after an upgrade,
a failing contract shows what broke and which function here to change. Tested with transformers 5.17 to 5.24.

Nothing here imports a trainer or DeepSpeed at the top, so inference stays light.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

Forward = TypeVar("Forward", bound=Callable[..., Any])

CACHE = "cache" if "cache" in inspect.signature(Qwen2DecoderLayer.forward).parameters else "past_key_values"
"""Name of the cache argument and output: ``past_key_values`` until 5.23, ``cache`` from 5.24 on."""


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """A cache as the keyword argument, or output field, of the installed transformers."""
    return {CACHE: cache}


# -- models -----------------------------------------------------------------------------------------------


def attention_implementation(config: PreTrainedConfig) -> str:
    """Name of the attention back end that a model was built with; the public attribute is write-only."""
    return config._attn_implementation


def set_attention_implementation(config: PreTrainedConfig, name: str) -> None:
    """Choose a back end while a model is being built, before ``model.set_attn_implementation`` can be called."""
    config._attn_implementation = name


def backbone_forward(forward: Forward) -> Forward:
    """Decorate a backbone's ``forward`` as transformers decorates Qwen2Model's.

    It fills ``use_cache`` from the configuration and collects hidden states and attentions through hooks.
    """
    return merge_with_config_defaults(capture_outputs(forward))


def recorded_outputs(num_layers_attribute: str) -> dict[str, Any]:
    """What ``output_hidden_states`` and ``output_attentions`` record, for a model class's ``_can_record_outputs``.

    Args:
        num_layers_attribute: configuration attribute with the number of layers that a forward pass runs. It
            resolves negative indices; 5.17 has neither the field nor indices.
    """
    fields = inspect.signature(OutputRecorder).parameters
    layers: dict[str, Any] = {}
    if "num_hidden_layers_key" in fields:
        layers["num_hidden_layers_key"] = num_layers_attribute
    return {
        "hidden_states": OutputRecorder(Qwen2DecoderLayer, **layers),
        "attentions": OutputRecorder(Qwen2Attention, index=1),
    }


def checkpointing_function(module: nn.Module) -> Callable[..., Any] | None:
    """The function that gradient checkpointing wraps around layers, or None where it is off."""
    if not getattr(module, "gradient_checkpointing", False):
        return None
    function: Callable[..., Any] = module._gradient_checkpointing_func  # type: ignore[assignment]
    return function


def enable_checkpointing(module: PreTrainedModel) -> None:
    """Turn gradient checkpointing on, non-reentrant. transformers 5.23 renames the method; 5.17 knows the old name."""
    enable: Any = (
        getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})


def disable_checkpointing(layer: nn.Module) -> None:
    """Turn gradient checkpointing off again for one layer."""
    layer.gradient_checkpointing = False  # type: ignore[assignment]


def keep_initialized_mark(old: nn.Module, new: nn.Module) -> None:
    """Carry over the mark that keeps ``post_init()`` from initializing a module's weights again."""
    mark: Any = getattr(old, "_is_hf_initialized", False)
    new._is_hf_initialized = mark


# -- generation -------------------------------------------------------------------------------------------


class GenerationHooks:
    """Public names for the private methods of GenerationMixin that ``generate()`` calls and a model may change.

    A base of a model class, listed before its transformers class. Each hook receives the method that transformers
    would have called.
    """

    def read_generation_config(
        self, read: Callable[..., Any], generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        """Resolve the configuration of one call; returns it and the arguments that belong to the model."""
        return read(generation_config, **kwargs)

    def check_generation_mode(self, mode: GenerationMode, generation_config: GenerationConfig) -> None:
        """Refuse a mode (greedy search, sampling, beam search, …) that the model cannot run.

        Raises:
            ValueError: the mode and the configuration do not go together.
        """

    def decode(self, decode: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run greedy search or sampling."""
        return decode(input_ids, *args, **kwargs)

    def expand_inputs(
        self, expand: Callable[..., Any], expand_size: int, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeat each row ``expand_size`` times, for beams and for several sequences per prompt."""
        return expand(expand_size=expand_size, **kwargs)

    def _next(self, name: str) -> Callable[..., Any]:
        """The method that this class overrides."""
        method: Callable[..., Any] = getattr(super(), name)
        return method

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        return self.read_generation_config(
            self._next("_prepare_generation_config"), generation_config, **kwargs
        )

    def _validate_generation_mode(
        self, generation_mode: GenerationMode, generation_config: GenerationConfig, arguments: dict[str, Any]
    ) -> None:
        self._next("_validate_generation_mode")(generation_mode, generation_config, arguments)
        self.check_generation_mode(generation_mode, generation_config)

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.decode(self._next("_sample"), input_ids, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        return self.expand_inputs(
            self._next("_expand_inputs_for_generation"),
            expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )


def detach_from_model_config(generation_config: GenerationConfig) -> None:
    """Keep our fields when a generation config is read back.

    transformers ignores unknown fields of a config that is marked as derived from the model's.
    """
    generation_config._from_model_config = False


def pad_token(generation_config: GenerationConfig) -> Tensor | None:
    """The padding id (scalar tensor) that ``generate()`` resolved for this call."""
    return generation_config._pad_token_tensor


def has_unfinished_sequences(
    model: PreTrainedModel, finished: bool, synced_gpus: bool, device: torch.device
) -> bool:
    """Whether this rank, or with ``synced_gpus`` any rank, still generates."""
    ask: Any = model._has_unfinished_sequences
    return bool(ask(finished, synced_gpus, device=device))


# -- training ---------------------------------------------------------------------------------------------


def disable_shared_memory_allreduce() -> None:
    """Keep DeepSpeed from compiling a shared-memory all-reduce on CPUs; only its inference engine uses it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def reduced_gradients(engine: Any) -> list[tuple[Tensor, nn.Parameter]]:
    """This rank's share of the reduced gradients before DeepSpeed's update, each with its parameter.

    Empty if DeepSpeed keeps them on the host (offloading) or in another form.
    """
    optimizer = engine.optimizer
    groups = getattr(optimizer, "params_in_partition", None) or getattr(optimizer, "fp16_groups", [])
    held: dict[int, list[Tensor] | None] = getattr(optimizer, "averaged_gradients", {})
    pairs: list[tuple[Tensor, nn.Parameter]] = []
    for index, parameters in enumerate(groups):
        gradients = [g for g in held.get(index) or [] if not getattr(g, "_zero_padding", False)]
        pairs += zip(gradients, parameters, strict=False)
    return pairs


def before_update(engine: Any, function: Callable[[], None]) -> None:
    """Call a function whenever DeepSpeed has reduced the gradients and is about to update."""
    step: Callable[..., Any] = engine.optimizer.step

    def with_function(*args: Any, **kwargs: Any) -> Any:
        function()
        return step(*args, **kwargs)

    engine.optimizer.step = with_function
