"""LoRA: the backbone keeps its weights and learns through small adapters (Hu et al., arXiv:2106.09685), by PEFT.

    bash scripts/deepspeed/sts_qwen25/finetune_glm4voice_mtp10_stage2.sh 2048 run1 --lora_r 16
    python tools/merge_lora.py OUTPUT_DIR --output_dir MERGED

A projection W of the backbone computes W + (alpha / r) B A, of which A (r, in) and B (out, r) train. These train whole:

* the heads, which are new or have to follow the backbone; LoRA of a head would save little, since there is one
  layer in each;
* the adapter of the Plus family's audio input, and its encoder with ``--audio_model_freeze False``;
* token embedding and LM head if the stage adds tokens (stage 1), since their rows start from nothing; otherwise they
  keep their weights. ``--lora_train_embeddings`` decides otherwise.

A checkpoint holds what trains and not the base: ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's
names, the parameters that train whole among them, with ``config.json`` and the tokenizer. It records a fingerprint of
the base model, without which it is worth nothing, and is refused on another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from vita_audio.files import read_json
from vita_audio.models import load_with_heads, resize_vocabulary
from vita_audio.models.folder import CheckpointError, read_config, read_header, weight_files
from vita_audio.models.open import locate
from vita_audio.models.weights import WRAPPED, is_head_parameter
from vita_audio.provenance import RUN_FILE
from vita_audio.training.lora_arguments import LoraArguments

if TYPE_CHECKING:
    from vita_audio.training.arguments import ModelArguments

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = "default"
_FINGERPRINT = "base_fingerprint"
_SAMPLED_BYTES = 4096


class LoraModel(PeftModel):
    """A model with adapters that saves and loads everything that trains.

    Args:
        model: its ``requires_grad`` says what the stage would train without LoRA.
        config: of the adapters.
        train_embeddings: whether token embedding and LM head train.
    """

    fingerprint: str = ""

    def __init__(self, model: PreTrainedModel, config: LoraConfig, *, train_embeddings: bool) -> None:
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        super().__init__(cast(Any, model), config, autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            whole = name in trainable and trains_whole(model, name, train_embeddings=train_embeddings)
            parameter.requires_grad_(is_adapter(name) or whole)

    def save_pretrained(
        self,
        save_directory: str,
        *args: Any,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save what trains, the adapters' config and the model's; ``state_dict`` may hold more."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        model = cast(PreTrainedModel, self.get_base_model())
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        self.peft_config[_ADAPTER].save_pretrained(str(folder))
        values = self.state_dict() if state_dict is None else state_dict
        save_file(
            {stored_name(name): values[name].contiguous() for name, _ in trained_parameters(self)},
            folder / ADAPTER_WEIGHTS,
            metadata={"format": "pt", _FINGERPRINT: self.fingerprint},
        )

    def load_adapter(self, model_id: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Load what :meth:`save_pretrained` saved.

        Raises:
            CheckpointError: parameters are missing, unknown, or of another base model.
        """
        names = {stored_name(name): name for name, _ in trained_parameters(self)}
        check_stored(Path(model_id), dict(trained_parameters(self)))
        check_base(Path(model_id), self.fingerprint)
        tensors = load_file(Path(model_id) / ADAPTER_WEIGHTS)
        self.load_state_dict({names[stored]: tensor for stored, tensor in tensors.items()}, strict=False)


def add_lora(model: PreTrainedModel, arguments: ModelArguments) -> LoraModel:
    """Put adapters into a model whose stage has been applied; the rest of the backbone is frozen.

    Args:
        model: changed in place; its modules stay where they are.
        arguments: of the run; ``lora_train_embeddings`` is resolved.
    """
    base = locate(arguments.model_name_or_path)
    wrapped = insert_adapters(model, arguments, str(base.resolve()))
    wrapped.fingerprint = fingerprint(base)
    return wrapped


def insert_adapters(model: PreTrainedModel, options: LoraArguments, base: str | None = None) -> LoraModel:
    """Put fresh adapters into a model; ``base`` is the name that their folder gives."""
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_scale,
        lora_dropout=options.lora_dropout,
        target_modules=list(options.lora_target_modules),
        layers_to_transform=list(range(model.config.num_backbone_layers)),
        layers_pattern="layers",
        base_model_name_or_path=base,
    )
    return LoraModel(model, config, train_embeddings=bool(options.lora_train_embeddings))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def trains_whole(model: nn.Module, name: str, *, train_embeddings: bool) -> bool:
    """Whether LoRA leaves a parameter to train as it is; names are the model's own."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return train_embeddings
    return is_head_parameter(model, name) or name.startswith("model.audio_")


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that train."""
    return [(name, each) for name, each in model.named_parameters() if each.requires_grad]


def stored_name(name: str) -> str:
    """PEFT's name in a file for a parameter of a :class:`LoraModel`."""
    return name.replace(f".{_ADAPTER}.", ".") if is_adapter(name) else name


def fingerprint(folder: Path) -> str:
    """Tells models of one shape apart: a digest of the first bytes of every tensor.

    Raises:
        CheckpointError: the folder holds no whole model.
    """
    tensors = {name: tensor for file in weight_files(folder) for name, tensor in read_header(file).items()}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            sample = stream.read(min(_SAMPLED_BYTES, tensor.end - tensor.start))
        digest.update(name.encode() + sample)
    return digest.hexdigest()


def check_base(folder: Path, base: str) -> None:
    """Refuse a base model that is not the one the adapters were trained on.

    Args:
        folder: with adapters.
        base: fingerprint of the base model.

    Raises:
        CheckpointError: it is another.
    """
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        trained_on = (file.metadata() or {}).get(_FINGERPRINT)
    if trained_on != base:
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: its adapters were trained on {named}, and the base model given has other weights; "
            "give that model"
        )


def check_stored(folder: Path, wanted: dict[str, nn.Parameter]) -> None:
    """Check that a folder holds these parameters and no others, each of its shape.

    Args:
        folder: with adapters.
        wanted: parameters of a :class:`LoraModel` by name; under ZeRO-3 a part has its whole shape in ``ds_shape``.

    Raises:
        CheckpointError: one is missing, of another shape, or not known.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; copy the complete folder")
    stored = {name: tensor.shape for name, tensor in read_header(file).items()}
    shapes = {
        stored_name(name): tuple(getattr(each, "ds_shape", each.shape)) for name, each in wanted.items()
    }
    bad = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
    if bad:
        raise CheckpointError(
            f"{file}: {len(bad)} of {len(shapes)} trained parameters do not fit, the first is {bad[0]}: "
            f"stored {stored.get(bad[0])}, wanted {shapes.get(bad[0])}"
        )


def check_adapter_folder(folder: Path) -> None:
    """Check that a result or checkpoint of LoRA holds everything that trained.

    Raises:
        CheckpointError: it does not.
    """
    from vita_audio import models

    config = read_config(folder, adapter=True)
    with torch.device("meta"):
        model = getattr(models, (config.architectures or ["Qwen2MTPForCausalLM"])[0])(config)
    check_stored(folder, dict(_trained_as_stored(model, folder)))


def open_with_adapter(folder: Path, base: str | None = None) -> LoraModel:
    """The base model with the adapters and everything else that a run trained, in evaluation mode.

    Args:
        folder: result or checkpoint of a run with ``--lora_r``.
        base: the base model; defaults to the one that the folder names.

    Raises:
        CheckpointError: folder or base cannot be used, or do not belong together.
    """
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / RUN_FILE).is_file():
        raise CheckpointError(f"{folder}: not the result of a run with --lora_r")
    config = read_config(folder, adapter=True)
    run = read_json(folder / RUN_FILE)["arguments"]
    named = base or read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
    try:
        place = locate(named)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give the base model with --base") from error
    model = load_with_heads(
        place,
        config.num_nextn_predict_layers,
        sensevoice=bool(getattr(config, "continuous_input", False)),
        audio_model_path=run.get("audio_model_name_or_path"),
        dtype=config.dtype,
    )
    resize_vocabulary(model, config.vocab_size)
    wrapped = _trained_as_stored_model(model, folder)
    wrapped.fingerprint = fingerprint(place)
    wrapped.load_adapter(str(folder))
    return wrapped.eval()


def _trained_as_stored_model(model: PreTrainedModel, folder: Path) -> LoraModel:
    """The adapters of a folder in a model; what the folder holds whole, trains."""
    stored = read_header(folder / ADAPTER_WEIGHTS).keys() if (folder / ADAPTER_WEIGHTS).is_file() else ()
    train_embeddings = f"{WRAPPED}model.embed_tokens.weight" in stored
    encoder = any(name.startswith(f"{WRAPPED}model.audio_model.") for name in stored)
    model.requires_grad_(True)
    if getattr(model.config, "continuous_input", False) and not encoder:
        model.model.audio_model.requires_grad_(False)
    config = LoraConfig.from_pretrained(str(folder))
    return LoraModel(model, cast(LoraConfig, config), train_embeddings=train_embeddings)


def _trained_as_stored(model: PreTrainedModel, folder: Path) -> Iterable[tuple[str, nn.Parameter]]:
    return trained_parameters(_trained_as_stored_model(model, folder))
