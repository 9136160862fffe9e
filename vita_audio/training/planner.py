"""What a stage costs before it runs: parameters, memory of each GPU, operations, time, and disk.

    plan = make_plan(config, Setup(language_model_freeze=True, gpus=16), Zero(stage=2))
    plan.peak_bytes, plan.flops_per_step, plan.hours(flops_per_second=989e12, mfu=0.4)

Parameters and operations are exact (:mod:`vita_audio.models.cost`), activations are found by a pass over tensors
without data (:mod:`vita_audio.training.step_memory`), and weights, gradients and optimizer states follow from how
DeepSpeed's ZeRO keeps them. docs/planning.md compares planned with measured memory.

MFU, model FLOPs utilisation, counts the operations that the step needs: forward, and twice that backward where
weights train. Recomputation by gradient checkpointing is not counted, so it lowers the MFU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from vita_audio.models import Qwen2MTPConfig
from vita_audio.models.configuration import Qwen2MTPSenseVoiceConfig
from vita_audio.models.cost import (
    AUDIO_ADAPTER,
    AUDIO_ENCODER,
    HEADS,
    LANGUAGE_MODEL,
    LORA_ADAPTERS,
    PROJECTIONS,
    adapter_parameters,
    audio_pass,
    backbone_pass,
    count_parameters,
    head_pass,
    layer_products,
    lm_head_pass,
    vocabulary_parameters,
)
from vita_audio.models.loss import CHUNK_LOGITS_CPU, CHUNK_LOGITS_GPU
from vita_audio.training.arguments import DataArguments, ModelArguments, StageArguments
from vita_audio.training.deepspeed_config import read_deepspeed_config
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.optimizers import EIGHT_BIT, EIGHT_BIT_MOMENTS
from vita_audio.training.recomputation import layers_with_gradient
from vita_audio.training.step_memory import Batch, step_memory

if TYPE_CHECKING:
    from vita_audio.training.arguments import DataArguments, ModelArguments, StageArguments

CODES_PER_SECOND = 12.5
_CONTEXT_BYTES = 2_000_000_000
"""Of a GPU for CUDA, NCCL and fragmentation."""
_PLAN_ERROR = 0.1
"""Share by which planned and real memory may differ."""
_MASTER, _MOMENTS = 4, 8
"""Bytes of a parameter's float32 copy and of Adam's two moments."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        flops: dense bfloat16 operations a second at its peak, from the vendor's sheet.
        memory: bytes.
    """

    flops: float
    memory: float

    @property
    def usable_bytes(self) -> float:
        """What tensors can use."""
        return self.memory - _CONTEXT_BYTES


GPUS = {
    "H20 (148 TFLOPS)": Gpu(148e12, 96e9),
    "A100 80 GB": Gpu(312e12, 80e9),
    "H100 80 GB": Gpu(989e12, 80e9),
    "B200": Gpu(2250e12, 180e9),
}
"""The original was trained on 16 GPUs of 148 TFLOPS, the peak of an H20."""


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed shares states between ranks.

    Attributes:
        stage: 0: no DeepSpeed, PyTorch's AdamW on the weights; 1, 2 or 3: ZeRO.
        reduce_bucket: elements of a bucket of gradients.
        overlap: a second bucket fills while the first is reduced.
        offload_optimizer: float32 weights and moments are in the host's memory.
        offload_weights: so are the weights (ZeRO-3).
        live_weights: elements that ZeRO-3 keeps gathered.
    """

    stage: int = 2
    reduce_bucket: int = 500_000_000
    overlap: bool = True
    offload_optimizer: bool = False
    offload_weights: bool = False
    live_weights: int = 1_000_000_000

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> Zero:
        """From a DeepSpeed config, or None for a run without DeepSpeed; DeepSpeed's defaults hold."""
        if config is None:
            return cls(stage=0)
        zero = config.get("zero_optimization") or {}

        def number(name: str, default: float) -> int:
            value = zero.get(name, default)
            return int(default if value == "auto" else value)

        def offloaded(what: str) -> bool:
            return (zero.get(f"offload_{what}") or {}).get("device", "none") != "none"

        stage = number("stage", 0)
        return cls(
            stage=stage,
            reduce_bucket=number("reduce_bucket_size", 5e8),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            offload_optimizer=offloaded("optimizer"),
            offload_weights=stage == 3 and offloaded("param"),
            live_weights=number("stage3_max_live_parameters", 1e9),
        )


@dataclass(frozen=True)
class Setup:
    """One stage on one cluster.

    Attributes:
        language_model_freeze: only the heads train (stages 2 and 3).
        audio_model_freeze: the SenseVoice encoder does not train.
        batch: what a rank computes at once.
        accumulation: micro-batches of an optimizer step.
        steps: optimizer steps.
        gpus: ranks of the whole cluster.
        dtype: type of the weights.
        checkpointed_layers: how many layers recompute their activations, the first ones. None: all.
        device: ``cuda``, or ``cpu`` for the settings that training has there.
        lora: options of the adapters. None: no LoRA.
        moments: bytes of Adam's two moments of a parameter. None: as precise as the weights that are updated.
    """

    language_model_freeze: bool = False
    audio_model_freeze: bool = True
    batch: Batch = field(default_factory=Batch)
    accumulation: int = 16
    steps: int = 8000
    gpus: int = 8
    dtype: torch.dtype = torch.bfloat16
    checkpointed_layers: int | None = None
    device: str = "cuda"
    lora: LoraArguments | None = None
    moments: float | None = None

    def recomputed_layers(self, config: Qwen2MTPConfig) -> int:
        """``checkpointed_layers``, resolved."""
        layers = layers_with_gradient(config, heads_only=self.language_model_freeze)
        return layers if self.checkpointed_layers is None else min(layers, self.checkpointed_layers)

    @property
    def trains_vocabulary(self) -> bool:
        """Whether token embedding and LM head train."""
        return not self.language_model_freeze and (self.lora is None or bool(self.lora.lora_train_embeddings))


@dataclass(frozen=True)
class Plan:
    """The costs of a stage. Bytes are those of one GPU unless they say otherwise.

    Attributes:
        parameters: (trained, all) of each part.
        states: bytes that are there throughout, by kind.
        backward: bytes on top of them in the forward and backward pass, by kind.
        update: bytes on top of them in the optimizer's step, by kind.
        host_bytes: bytes of one rank in the host's memory.
        flops_per_step: operations that an optimizer step of all GPUs needs.
        recomputed_flops: operations of such a step on top of them, by checkpointing.
        tokens_per_step: positions of all rows of an optimizer step.
        steps: optimizer steps.
        gpus: ranks.
        recomputed_layers: layers whose activations are recomputed.
        layers: layers that have a gradient.
        result_bytes: disk space of a model folder.
        checkpoint_bytes: disk space of a checkpoint, from which training resumes.
    """

    parameters: dict[str, tuple[int, int]]
    states: dict[str, int]
    backward: dict[str, int]
    update: dict[str, int]
    host_bytes: int
    flops_per_step: int
    recomputed_flops: int
    tokens_per_step: int
    steps: int
    gpus: int
    recomputed_layers: int
    layers: int
    result_bytes: int
    checkpoint_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that a GPU holds at once, without the CUDA context and fragmentation."""
        return sum(self.states.values()) + max(sum(self.backward.values()), sum(self.update.values()))

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(trained for trained, _ in self.parameters.values())

    def step_seconds(self, flops_per_second: float, mfu: float) -> float:
        """Seconds of an optimizer step.

        Args:
            flops_per_second: the peak of one GPU.
            mfu: share of it that the model's operations reach.
        """
        return self.flops_per_step / (flops_per_second * mfu * self.gpus)

    def hours(self, flops_per_second: float, mfu: float) -> float:
        """Hours of the whole stage; times the GPUs, GPU-hours. Arguments as for :meth:`step_seconds`."""
        return self.steps * self.step_seconds(flops_per_second, mfu) / 3600

    def speech_hours(self, speech_share: float = 1.0) -> float:
        """Hours of speech that the stage sees when this share of all positions are speech tokens."""
        return self.steps * self.tokens_per_step * speech_share / CODES_PER_SECOND / 3600


def make_plan(config: Qwen2MTPConfig, setup: Setup, zero: Zero) -> Plan:
    """Plan a stage of a model with this config.

    Runs a pass over tensors without data, which takes some seconds for 7B.
    """
    parameters = _parameters(config, setup)
    trained = sum(trained for trained, _ in parameters.values())
    total = sum(every for _, every in parameters.values())
    value_bytes = setup.dtype.itemsize
    ranks = setup.gpus
    share = trained / ranks if zero.stage else trained
    # LoRA's folders hold what trains.
    saved = total if setup.lora is None else trained
    on_host = value_bytes * total / ranks if zero.offload_weights else 0.0
    if zero.offload_optimizer:
        on_host += (_MASTER + _moments(setup, zero) + 4) * share
    update_flops, recomputed = step_flops(config, setup)
    per_step = ranks * setup.accumulation
    return Plan(
        parameters=parameters,
        states=_states(setup, zero, trained, total),
        backward=_backward(config, setup, zero, trained),
        update=_update(setup, zero, share),
        host_bytes=round(on_host),
        flops_per_step=update_flops * per_step,
        recomputed_flops=recomputed * per_step,
        tokens_per_step=setup.batch.tokens * per_step,
        steps=setup.steps,
        gpus=ranks,
        recomputed_layers=setup.recomputed_layers(config),
        layers=layers_with_gradient(config, heads_only=setup.language_model_freeze),
        result_bytes=value_bytes * saved,
        checkpoint_bytes=_checkpoint_bytes(setup, zero, trained, saved),
    )


def plan_within(config: Qwen2MTPConfig, setup: Setup, zero: Zero, memory: float) -> Plan:
    """The plan in which as few layers as fit a GPU's memory recompute their activations; all, if none fits.

    Args:
        memory: bytes of the GPU. A tenth stays free, since the plan is as exact as that, and so does what CUDA takes.
    """
    usable = memory * (1 - _PLAN_ERROR) - (_CONTEXT_BYTES if setup.device == "cuda" else 0)
    fewest, most = 0, layers_with_gradient(config, heads_only=setup.language_model_freeze)
    best = make_plan(config, replace(setup, checkpointed_layers=most), zero)
    while fewest < most:
        middle = (fewest + most) // 2
        plan = make_plan(config, replace(setup, checkpointed_layers=middle), zero)
        if plan.peak_bytes <= usable:
            best, most = plan, middle
        else:
            fewest = middle + 1
    return best


def plan_run(
    config: Qwen2MTPConfig,
    model: ModelArguments,
    data: DataArguments,
    stage: StageArguments,
    *,
    gpus: int,
    dtype: torch.dtype,
    device: str,
) -> Plan:
    """Plan the run that a trainer's options describe; see :class:`Setup` for the others."""
    setup = Setup(
        language_model_freeze=model.language_model_freeze,
        audio_model_freeze=model.audio_model_freeze,
        batch=Batch(stage.per_device_train_batch_size, data.model_max_length),
        accumulation=stage.gradient_accumulation_steps,
        steps=stage.max_steps,
        gpus=gpus,
        dtype=dtype,
        checkpointed_layers=stage.fixed_checkpointed_layers,
        device=device,
        lora=model if model.lora_r else None,
        moments=EIGHT_BIT_MOMENTS if stage.optim in EIGHT_BIT else None,
    )
    zero = Zero.from_config(read_deepspeed_config(stage.deepspeed) if stage.deepspeed else None)
    if stage.chooses_checkpointed_layers:
        return plan_within(config, setup, zero, stage.gpu_memory_bytes)
    return make_plan(config, setup, zero)


def step_flops(config: Qwen2MTPConfig, setup: Setup) -> tuple[int, int]:
    """Operations of one rank's micro-batch: those that it needs, and those that checkpointing repeats."""
    batch = setup.batch
    documents = batch.documents * batch.rows
    trains_llm = not setup.language_model_freeze
    num_heads = config.num_nextn_predict_layers
    backbone = sum(backbone_pass(config, length).flops for length in documents)
    adapters = 0
    if setup.lora is not None:
        size = adapter_parameters(config, setup.lora.lora_r, setup.lora.lora_target_modules)
        adapters = 2 * batch.tokens * size
    heads = num_heads * sum(head_pass(config, length).flops for length in documents)
    rows = batch.supervised_tokens * (num_heads + trains_llm)
    # Gradients of the rows in any case, of the LM head's weights where it trains.
    lm_head = lm_head_pass(config, rows).flops * (3 if setup.trains_vocabulary else 2)
    needed = backbone * (3 if trains_llm else 1) + 3 * (heads + adapters) + lm_head
    if setup.lora is not None:  # the matrices get no gradient, their inputs do
        needed -= 2 * batch.tokens * config.num_backbone_layers * layer_products(config)
    if isinstance(config, Qwen2MTPSenseVoiceConfig):
        # Without clips, which add little; a silent frame passes through.
        audio = audio_pass(config, 1)
        needed += audio[AUDIO_ENCODER].flops * (1 if setup.audio_model_freeze else 3)
        needed += audio[AUDIO_ADAPTER].flops * (3 if trains_llm else 1)
    recomputed_layers = setup.recomputed_layers(config)
    in_backbone = min(recomputed_layers, config.num_backbone_layers) if trains_llm else 0
    in_heads = recomputed_layers - in_backbone
    # torch stops recomputing a layer before its last product, and a head's fusion before its only one.
    d, last = config.hidden_size, config.hidden_size * config.intermediate_size
    adapted_last = setup.lora is not None and PROJECTIONS[-1] in setup.lora.lora_target_modules
    skipped = in_heads * (last + 2 * d * d)
    skipped += in_backbone * (d * setup.lora.lora_r if setup.lora and adapted_last else last)
    recomputed = (backbone + adapters) * in_backbone // config.num_backbone_layers
    recomputed += heads * in_heads // max(1, num_heads)
    return needed, recomputed - 2 * batch.tokens * skipped


def _parameters(config: Qwen2MTPConfig, setup: Setup) -> dict[str, tuple[int, int]]:
    counts = count_parameters(config)
    trains_llm = not setup.language_model_freeze
    trained = {
        LANGUAGE_MODEL: counts[LANGUAGE_MODEL] if trains_llm else 0,
        HEADS: counts.get(HEADS, 0),
        AUDIO_ENCODER: 0 if setup.audio_model_freeze or not trains_llm else counts.get(AUDIO_ENCODER, 0),
        AUDIO_ADAPTER: counts.get(AUDIO_ADAPTER, 0) if trains_llm else 0,
    }
    if setup.lora is not None:
        trained[LANGUAGE_MODEL] = vocabulary_parameters(config) if setup.trains_vocabulary else 0
        adapters = adapter_parameters(config, setup.lora.lora_r, setup.lora.lora_target_modules)
        counts[LORA_ADAPTERS] = trained[LORA_ADAPTERS] = adapters
    return {part: (trained[part], count) for part, count in counts.items()}


def _states(setup: Setup, zero: Zero, trained: int, total: int) -> dict[str, int]:
    value_bytes, ranks = setup.dtype.itemsize, setup.gpus
    moments = _moments(setup, zero)
    if zero.stage == 0:
        return {"weights": value_bytes * total, "optimizer": round(moments * trained)}
    weights = value_bytes * total
    if zero.stage == 3:
        gathered = value_bytes * min(total, zero.live_weights)
        weights = gathered + (0 if zero.offload_weights else weights // ranks)
    optimizer = 0 if zero.offload_optimizer else round((_MASTER + moments) * trained) // ranks
    # A GPU reserves whole buckets; on a CPU they take memory only as they fill, which is after the peak.
    elements = zero.reduce_bucket if setup.device == "cuda" else 0
    buckets = value_bytes * elements * (2 if zero.overlap else 1)
    return {"weights": weights, "optimizer": optimizer, "buckets": buckets}


def _moments(setup: Setup, zero: Zero) -> float:
    """Bytes of Adam's moments of a parameter; without DeepSpeed they have the type of the weights."""
    if setup.moments is not None:
        return setup.moments
    return _MOMENTS if zero.stage else 2 * setup.dtype.itemsize


def _backward(config: Qwen2MTPConfig, setup: Setup, zero: Zero, trained: int) -> dict[str, int]:
    peak, gradients = step_memory(
        config,
        setup.batch,
        language_model_freeze=setup.language_model_freeze,
        audio_model_freeze=setup.audio_model_freeze,
        dtype=setup.dtype,
        checkpointed_layers=setup.checkpointed_layers,
        held_gradient=_held_gradient(setup, zero),
        earlier_gradients=setup.accumulation > 1,
        chunk_logits=CHUNK_LOGITS_GPU if setup.device == "cuda" else CHUNK_LOGITS_CPU,
        lora=setup.lora,
    )
    gradients = min(gradients, peak)
    return {"gradients": gradients, "activations and loss": peak - gradients}


def _held_gradient(setup: Setup, zero: Zero) -> float:
    """The share of the gradients that a rank keeps until the update."""
    if zero.stage < 2:
        return 1.0
    return 0.0 if zero.offload_optimizer else 1 / setup.gpus


def _update(setup: Setup, zero: Zero, share: float) -> dict[str, int]:
    value_bytes = setup.dtype.itemsize
    # Adam of a CPU goes parameter by parameter with two temporary tensors; a GPU's is fused and has none.
    temporary = 2 * _MASTER * share if setup.device == "cpu" else 0.0
    if zero.stage == 0:
        return {"gradients": round(value_bytes * share), "optimizer's temporary tensors": round(temporary)}
    if zero.offload_optimizer:
        return {"gradients": 0}
    # Flat in the type of the weights, then in float32, beside the parts that were reduced.
    flat = 2 * value_bytes * share + (_MASTER * share if value_bytes < _MASTER else 0)
    return {"gradients": round(max(flat, _MASTER * share + temporary))}


def _checkpoint_bytes(setup: Setup, zero: Zero, trained: int, saved: int) -> int:
    """The model folder; with DeepSpeed the weights once more, and the optimizer's states of all ranks."""
    value_bytes, moments = setup.dtype.itemsize, _moments(setup, zero)
    if zero.stage == 0:
        return round(value_bytes * saved + moments * trained)
    return round(2 * value_bytes * saved + (_MASTER + moments) * trained)
