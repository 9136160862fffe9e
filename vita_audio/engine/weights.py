"""A model's weights as the engine reads them: products that follow each other on one input are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from vita_audio.engine.drafting import RoundCost
from vita_audio.engine.kernels import Norm, Product, cpu_kernels, gpu_kernels
from vita_audio.engine.quantized import Int8Product

if TYPE_CHECKING:
    from vita_audio.engine.cpu_kernels import Backbone, HeadPass
    from vita_audio.models import Qwen2MTPForCausalLM

CACHED = 32 << 20
"""Weights of fewer bytes may stay in a CPU's caches."""
POSITION_COST = 0.15
"""What each further position then adds to a pass, as a share of it; 0.14 to 0.19 were measured."""
STATIC_ROPE = ("default", "linear", "yarn", "llama3")
"""Rotary embeddings that depend on the position alone."""


Quantization = Literal["none", "int8"]
"""Types of the weights: the model's own, or 8 bits."""


class AnyProduct(Protocol):
    """A product with a fixed weight; see :class:`~vita_audio.engine.kernels.Product`."""

    in_features: int
    out_features: int

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads."""
        ...

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(n, in) -> (n, out); ``add`` (n, out) is added to the result, in products without a bias, and may be
        overwritten."""
        ...


@dataclass(frozen=True)
class Layer:
    """A decoder layer.

    Attributes:
        qkv: queries, keys and values in one product.
        gate_up: both inputs of the gated MLP in one product.
        window: positions that the layer's attention reaches back; None: all.
    """

    input_norm: Norm
    qkv: AnyProduct
    out: AnyProduct
    mlp_norm: Norm
    gate_up: AnyProduct
    down: AnyProduct
    window: int | None

    @property
    def num_bytes(self) -> int:
        """Bytes of weights that a pass reads."""
        return sum(each.num_bytes for each in (self.qkv, self.out, self.gate_up, self.down))


@dataclass(frozen=True)
class Head:
    """An MCTP head: its fusion of embedding and state, and its layer."""

    embed_norm: Norm
    hidden_norm: Norm
    proj: AnyProduct
    layer: Layer


@dataclass(frozen=True)
class AudioRows:
    """The part of the vocabulary that speech uses, and its markers.

    Attributes:
        begin: id of ``<|begin_of_audio|>``; the rows of speech are those from here on.
        end: id of ``<|end_of_audio|>``.
    """

    begin: int
    end: int


class Weights:
    """All weights of a model of the family, ready for :mod:`vita_audio.engine.steps`.

    Args:
        model: on its device, in evaluation mode.
        audio_rows: the speech part of the vocabulary; None: it is never projected alone.
        quantization: ``int8`` keeps the matrices in 8 bits, one scale per output; on CPUs, and on GPUs with Triton.
        free: empty each matrix of the model once it is copied; the model can then generate no more.

    Raises:
        ValueError: the engine cannot run this model, or cannot quantize on its device.
    """

    def __init__(
        self,
        model: Qwen2MTPForCausalLM,
        audio_rows: AudioRows | None = None,
        quantization: Quantization = "none",
        free: bool = False,
    ):
        config: Any = model.config
        kind = config.rope_parameters.get("rope_type", "default")
        if kind not in STATIC_ROPE:
            raise ValueError(
                f"rope_type {kind}: the engine needs one of {', '.join(STATIC_ROPE)}; use generate()"
            )
        self.num_layers = config.num_backbone_layers
        self.num_heads = config.num_nextn_predict_layers
        self.d = config.hidden_size
        self.queries = config.num_attention_heads
        self.kv = config.num_key_value_heads
        self.head_size = getattr(config, "head_dim", None) or self.d // self.queries
        self.fused = gpu_kernels(model.device)
        if self.fused is not None and not self.fused.fits(self.head_size):
            self.fused = None
        own = cpu_kernels(model.device, model.dtype) if quantization == "none" else None
        fits = own is not None and own.fits(model.dtype, self.d, config.intermediate_size, self.head_size)
        if not fits or any(weight.dtype != model.dtype for weight in language_weights(model)):
            own = None
        make = Maker(model.device, quantization, free, own)
        embeddings: Any = model.get_input_embeddings()
        self.embedding: Tensor = embeddings.weight.detach()
        self.vocab_size = len(self.embedding)
        self.norm = _norm(model.model.norm)
        layers: Any = model.model.layers
        self.layers = [make.layer(layers[i], config, config.layer_type(i)) for i in range(self.num_layers)]
        self.heads = [
            make.head(head, config, config.layer_type(self.num_layers + head.index)) for head in model.heads
        ]
        # Whole passes in one call each, where the CPU's own kernels run.
        self.backbone_pass: Backbone | None = None
        self.head_passes: list[HeadPass] = []
        if own is not None:
            shape = self.queries, self.kv, self.head_size
            self.backbone_pass = own.Backbone(self.layers, self.norm, shape)
            self.head_passes = [own.HeadPass(head, self.norm, self.embedding, shape) for head in self.heads]
        self.reaches = {layer.window for layer in (*self.layers, *(head.layer for head in self.heads))}
        self.audio_rows = audio_rows
        self.audio_head: AnyProduct | None = None
        if audio_rows is not None:
            self.audio_head = make.kind([model.lm_head.weight[audio_rows.begin :]])
        tied = model.lm_head.weight is embeddings.weight
        self.lm_head = make.kind([model.lm_head.weight]) if tied else make.product(model.lm_head)
        self._rotary: Any = model.model.rotary_emb

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and caches."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of weights and caches."""
        return self.embedding.device

    def attends(self, width: int) -> bool:
        """Whether kernels of the engine's own attend in windows of ``width`` positions a row."""
        if self.backbone_pass is not None:
            return True
        return self.fused is not None and width <= self.fused.MOST_POSITIONS

    @property
    def backbone_bytes(self) -> int:
        """Bytes of weights that a pass of the backbone and the LM head reads."""
        return sum(layer.num_bytes for layer in self.layers) + self.lm_head.num_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of weights that one head and the LM head, over speech where it can, read."""
        if not self.heads:
            return 0
        head = self.heads[0]
        projection = self.lm_head if self.audio_head is None else self.audio_head
        return head.proj.num_bytes + head.layer.num_bytes + projection.num_bytes

    @cached_property
    def round_cost(self) -> RoundCost:
        """Cost of a lossless round: by the bytes it reads, and by its arithmetic where a CPU's caches may hold the
        weights."""
        cached = self.device.type == "cpu" and self.backbone_bytes < CACHED
        return RoundCost(self.head_bytes / self.backbone_bytes, POSITION_COST if cached else 0.0)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin, (length, d_head) each, of positions 0 … length - 1.

        The sign of the rotation is in sin: x * cos + roll(x, d_head / 2) * sin rotates.
        """
        positions = torch.arange(length, device=self.device)[None]
        cos, sin = (part[0] for part in self._rotary(self.embedding[:1], positions))
        half = self.head_size // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)


def language_weights(model: Qwen2MTPForCausalLM) -> Iterator[Tensor]:
    """The parameters of backbone, heads and LM head, without those of a speech encoder."""
    base: Any = model.model
    heads = (part for head in model.heads for part in (head.embed_norm, head.hidden_norm, head.proj))
    for part in (base.layers, base.norm, *heads, model.lm_head):
        yield from part.parameters()


class Maker:
    """Makes products of a model's linear layers; see :class:`Weights`.

    Args:
        own: the CPU's own kernels, where they run.
    """

    def __init__(self, device: torch.device, quantization: Quantization, free: bool, own: ModuleType | None):
        self.kind: Callable[..., AnyProduct] = Product if own is None else own.PackedProduct
        if quantization != "none":
            self.kind = int8_product(device)
        self._free = free

    def product(self, *linears: Any) -> AnyProduct:
        """The product with all of them, joined along their outputs."""
        made = self.kind([each.weight for each in linears], [each.bias for each in linears])
        if self._free:
            for each in linears:
                each.weight.data = each.weight.data.new_empty(0)
        return made

    def layer(self, module: Any, config: Any, layer_type: str) -> Layer:
        """A decoder layer."""
        attention, mlp = module.self_attn, module.mlp
        return Layer(
            input_norm=_norm(module.input_layernorm),
            qkv=self.product(attention.q_proj, attention.k_proj, attention.v_proj),
            out=self.product(attention.o_proj),
            mlp_norm=_norm(module.post_attention_layernorm),
            gate_up=self.product(mlp.gate_proj, mlp.up_proj),
            down=self.product(mlp.down_proj),
            window=config.sliding_window if layer_type == "sliding_attention" else None,
        )

    def head(self, module: Any, config: Any, layer_type: str) -> Head:
        """An MCTP head."""
        return Head(
            embed_norm=_norm(module.embed_norm),
            hidden_norm=_norm(module.hidden_norm),
            proj=self.product(module.proj),
            layer=self.layer(module.layer, config, layer_type),
        )


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def int8_product(device: torch.device) -> Callable[..., AnyProduct]:
    """The product with weights of 8 bits on a device.

    Raises:
        ValueError: there is none.
    """
    if device.type == "cpu":
        return Int8Product
    if (fused := gpu_kernels(device)) is None:
        raise ValueError(
            "quantization=int8: the engine has it on CPUs, and on GPUs where Triton runs; use none"
        )
    return fused.Int8WeightProduct


def can_run(model: Qwen2MTPForCausalLM) -> bool:
    """Whether the engine supports a model."""
    parameters: Any = model.config.rope_parameters
    return parameters.get("rope_type", "default") in STATIC_ROPE


def row_bytes(model: Qwen2MTPForCausalLM, length: int) -> int:
    """Bytes of the caches of one row of ``length`` tokens."""
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * size + config.hidden_size
    return length * per_token * torch.empty((), dtype=model.dtype).element_size()
