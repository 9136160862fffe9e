"""Models from folders: released checkpoints, plain Qwen2, and heads grown from what is there.

Module names are the released names, so transformers loads and saves without a mapping; this file
adds what it cannot know: which folders can serve, and where a missing head comes from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from vita_audio.audio.sensevoice.checkpoint import read_sizes
from vita_audio.constants import EMBEDDING_ROW_MULTIPLE
from vita_audio.models.configuration import Qwen2MTPConfig
from vita_audio.models.modeling import Qwen2MTPForCausalLM

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A folder cannot serve as a model; the message names the file and what to do."""


def load_with_heads(
    directory: str | Path,
    num_heads: int,
    *,
    sensevoice: bool = False,
    audio_model_path: str | Path | None = None,
    **from_pretrained_kwargs,
) -> Qwen2MTPForCausalLM:
    """A model with ``num_heads`` heads, from a plain Qwen2 folder or one with as many heads or fewer.

    Heads the folder has are kept. A missing head k > 0 copies the decoder layer, projection and norms
    of the head before it; a missing head 0 copies the backbone's last layer and starts with a fresh
    projection and norms of one (SPEC "Initialisation and growth"). What was grown is logged.

    Args:
        directory: config.json and safetensors, whole or in shards.
        num_heads: heads the model shall have; 0 gives the plain language model under this class.
        sensevoice: build the variant that reads SenseVoice features; a folder of that variant
            always gives it.
        audio_model_path: SenseVoiceSmall weights, for a folder that does not hold the encoder yet.
        from_pretrained_kwargs: dtype, attn_implementation, device_map, …

    Raises:
        CheckpointError: wrong architecture, missing shards or tensors, more heads than asked for, or a
            vocabulary smaller than that of the tokenizer beside it.
    """
    directory = Path(directory)
    config = check_folder(directory, num_heads)
    model_class = Qwen2MTPForCausalLM
    if sensevoice or config.model_type == "qwen2_mtp_sensevoice":
        from vita_audio.models.modeling_sensevoice import Qwen2MTPSenseVoiceForCausalLM

        model_class = Qwen2MTPSenseVoiceForCausalLM
    present = getattr(config, "num_nextn_predict_layers", 0)
    values = config.to_dict()
    values.pop("model_type", None)
    values["num_hidden_layers"] += num_heads - present
    values["num_nextn_predict_layers"] = num_heads
    # One entry a layer: let the configuration fill it in for the new number of layers.
    values.pop("layer_types", None)
    if config.model_type != model_class.config_class.model_type:
        values.pop("mtp_detach_backbone", None)  # each family has its own default
    if audio_model_path is not None:
        values.setdefault("audio_encoder", read_sizes(audio_model_path).to_dict())

    grown = range(present, num_heads)
    # transformers would list every tensor of the new heads as missing; we say it in one line instead.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, report = model_class.from_pretrained(
            directory,
            config=model_class.config_class(**values),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to refuse them in our own words below
            **from_pretrained_kwargs,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    started_fresh = start_new_parts(model, report["missing_keys"], audio_model_path)
    refuse_missing_tensors(model, directory, report, grown, started_fresh)
    grow_heads(model, grown)
    return model


def start_new_parts(
    model: nn.Module, missing: Iterable[str], audio_model_path: str | Path | None
) -> tuple[str, ...]:
    """Fill parts of a variant that a plain language model does not have; returns the prefixes of their names."""
    if not hasattr(model, "start_new_parts"):
        return ()
    return tuple(model.start_new_parts(set(missing), audio_model_path))


def check_folder(directory: Path, num_heads: int):
    """The folder's configuration, once it is clear that the folder can serve.

    Raises:
        CheckpointError: see :func:`load_with_heads`.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise CheckpointError(
            f"{config_file}: not found; give a folder with config.json and safetensors weights"
        )
    try:
        model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise CheckpointError(f"{config_file}: not valid JSON ({error}); fetch the file again") from error
    if model_type not in ("qwen2", "qwen2_mtp", "qwen2_mtp_sensevoice"):
        raise CheckpointError(
            f"{config_file}: model_type {model_type!r} is not a Qwen2 language model; use a folder of type "
            "qwen2, qwen2_mtp or qwen2_mtp_sensevoice"
        )
    config = AutoConfig.from_pretrained(directory)
    present = getattr(config, "num_nextn_predict_layers", 0)
    if num_heads < 0:
        raise CheckpointError(f"num_heads={num_heads}: must be 0 or more")
    if present > num_heads:
        raise CheckpointError(
            f"{config_file}: num_nextn_predict_layers is {present}, more than the {num_heads} heads asked for; "
            f"ask for at least {present}"
        )
    check_shards(directory)
    check_vocabulary(directory, config.vocab_size)
    return config


def check_shards(directory: Path) -> None:
    """Every weight file must be there and whole enough to list its tensors."""
    index_file = directory / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            names = sorted(set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index_file}: not an index of weight files; copy it again") from error
    else:
        names = ["model.safetensors"]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing)}); "
            "copy the complete folder"
        )
    for name in names:
        check_shard(directory / name)


def check_shard(file: Path) -> None:
    """A safetensors file ends where its header says; a torn download does not."""
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_size))
        except (ValueError, MemoryError, OverflowError) as error:
            raise CheckpointError(f"{file}: not a safetensors file; copy it again") from error
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    end = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors), default=0)
    if file.stat().st_size < end:
        raise CheckpointError(f"{file}: {file.stat().st_size} bytes of {end}, cut short; copy it again")


def check_vocabulary(directory: Path, vocab_size: int) -> None:
    """The tokenizer stored in the folder, if any, must fit its embedding matrix."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    ids = [token["id"] for token in content.get("added_tokens", ())]
    vocabulary = content.get("model", {}).get("vocab", {})
    ids.extend(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
    needed = max(ids, default=-1) + 1
    if needed > vocab_size:
        raise CheckpointError(
            f"{directory / 'config.json'}: vocab_size {vocab_size} is smaller than the {needed} tokens of "
            f"{file.name}; use the tokenizer this model was trained with"
        )


def refuse_missing_tensors(
    model: nn.Module, directory: Path, report: dict, grown: range, started_fresh: tuple[str, ...]
) -> None:
    """Only grown heads and freshly started parts may lack tensors; any other gap or shape is an error."""
    expected = tuple(prefix for k in grown for prefix in head_prefixes(model.config, k)) + started_fresh
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(
        name for name in report["missing_keys"] if not name.startswith(expected) and name not in tied
    )
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, the first is {missing[0]}; copy the complete folder"
        )
    if report.get("mismatched_keys"):
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{directory}: {name} has shape {tuple(stored)} where config.json asks for {tuple(wanted)}; "
            "use the config.json that belongs to these weights"
        )


def grow_heads(model: Qwen2MTPForCausalLM, grown: range) -> None:
    """Give each new head its start, in order, so that head 2 of three new ones copies head 1."""
    if not grown:
        return
    first = model.config.num_backbone_layers
    layers = model.model.layers
    for k in grown:
        copy_parameters(layers[first + k - 1], layers[first + k])
        if grown.start > 0:
            for modules in (model.mtp_projs, model.mtp_embed_norms, model.mtp_hidden_norms):
                copy_parameters(modules[k - 1], modules[k])
    source = f"backbone layer {first - 1}" if grown.start == 0 else f"head {grown.start - 1}"
    logger.warning("grown from %s: heads %s", source, ", ".join(map(str, grown)))


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters; under ZeRO-3 they are gathered for it and rank 0's copy is kept."""
    gathered = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(
            [*source.parameters(), *target.parameters()], modifier_rank=0
        )
    with gathered:
        for from_, to in zip(source.parameters(), target.parameters(), strict=True):
            to.copy_(from_)


def resize_vocabulary(model: nn.Module, num_tokens: int) -> int:
    """Make room for ``num_tokens`` tokens, rows padded to a multiple of 8; never shrinks.

    Returns:
        Rows of the embedding matrix.
    """
    if num_tokens > model.config.vocab_size:
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=EMBEDDING_ROW_MULTIPLE)
    return model.config.vocab_size


def head_prefixes(config: Qwen2MTPConfig, k: int) -> tuple[str, ...]:
    """Beginnings of the names of head k's own parameters."""
    layer = f"model.layers.{config.num_backbone_layers + k}."
    return (layer, f"mtp_projs.{k}.", f"mtp_embed_norms.{k}.", f"mtp_hidden_norms.{k}.")


def is_head_parameter(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a head (shared embedding, norm and LM head do not)."""
    heads = range(model.config.num_nextn_predict_layers)
    return name.startswith(tuple(prefix for k in heads for prefix in head_prefixes(model.config, k)))


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Stages 2 and 3: only the heads' own parameters train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head_parameter(model, name))
    return model
