"""Opens a model folder, for training, which grows heads, and for inference.

    model = load_with_heads("Qwen2.5-7B-Instruct", num_heads=10, dtype=torch.bfloat16)   # training
    model = open_model("output/stage4", device="cuda")                                   # inference
    tokenizer = open_tokenizer("output/stage4")

Both functions make the same checks (:mod:`~vita_audio.models.folder`) and need no network. A model in the
local Hugging Face cache is opened by its name, ``owner/name``; only ``hf://owner/name`` downloads it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from vita_audio.audio.sensevoice.checkpoint import read_sizes
from vita_audio.audio.sensevoice.encoder import SenseVoiceEncoder
from vita_audio.models.configuration import Qwen2MTPConfig
from vita_audio.models.folder import (
    CheckpointError,
    check_vocabulary,
    check_weights,
    one_line,
    read_config,
    useless_sampling_fields,
)
from vita_audio.models.modeling import Qwen2MTPForCausalLM
from vita_audio.models.modeling_sensevoice import Qwen2MTPSenseVoiceForCausalLM
from vita_audio.models.weights import copy_parameters, grow_heads, head_prefixes

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf://"
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors", "*.txt"]
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ENCODER_PREFIX, _ADAPTER_PREFIX = "model.audio_model.", "model.audio_projection."
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def open_model(
    path: str | PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    device: str | torch.device | None = None,
) -> Qwen2MTPForCausalLM:
    """A model as stored in its folder, in evaluation mode. A plain Qwen2 opens as a model without heads.

    Args:
        path: folder, name in the local Hugging Face cache, or ``hf://owner/name[@revision]`` to download.
        dtype: "auto" is the checkpoint's own.
        attn_implementation: attention back end; None leaves the choice to transformers.
        device: device to move the model to; None leaves it on the CPU.

    Raises:
        CheckpointError: see :func:`load_with_heads`.
        ValueError: there is no such device.
    """
    folder = locate(path)
    target = None if device is None else check_device(device)
    config = read_config(folder)
    heads = getattr(config, "num_nextn_predict_layers", 0)
    model = _open(folder, config, heads, dtype=dtype, attn_implementation=attn_implementation)
    if target is not None:
        cast(nn.Module, model).to(target)
    return model.eval()


def open_config(path: str | PathLike[str]) -> PreTrainedConfig:
    """The configuration of a folder that :func:`open_model` accepts; weights are not checked.

    Raises:
        CheckpointError: no such folder, or not a model of this family.
    """
    return read_config(locate(path))


def open_tokenizer(path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """The text tokenizer of a model folder.

    Raises:
        CheckpointError: no such folder, or no tokenizer in it.
    """
    folder = locate(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder}: no tokenizer.json; copy the tokenizer's files into the folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from error


def load_with_heads(
    directory: str | PathLike[str],
    num_heads: int,
    *,
    sensevoice: bool = False,
    audio_model_path: str | PathLike[str] | None = None,
    **from_pretrained_kwargs: Any,
) -> Qwen2MTPForCausalLM:
    """A model with ``num_heads`` heads, from a plain Qwen2 folder or one with at most that many heads.

    Existing heads are kept. A missing head k > 0 copies the decoder layer, projection and norms
    of the head before it; a missing head 0 copies the backbone's last layer and starts with a fresh
    projection and norms of ones (SPEC "Initialisation and growth"). The growth is logged.

    Args:
        directory: as ``path`` in :func:`open_model`; config.json and safetensors, whole or in shards.
        num_heads: heads of the model; 0 gives the plain language model under this class.
        sensevoice: build the variant that reads SenseVoice features. Always on for a folder of that variant.
        audio_model_path: folder of SenseVoiceSmall, for a model folder without the encoder.
        from_pretrained_kwargs: dtype, attn_implementation, device_map, …

    Raises:
        CheckpointError: no such folder, wrong architecture, weights that are missing, truncated, ambiguous or
            of other shapes, more heads than ``num_heads``, a tokenizer with more tokens than the vocabulary, or a
            generation config that could not be saved.
    """
    folder = locate(directory)
    config = read_config(folder)
    present = getattr(config, "num_nextn_predict_layers", 0)
    if num_heads < 0:
        raise CheckpointError(f"num_heads={num_heads}: must be 0 or more")
    if present > num_heads:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_nextn_predict_layers is {present}, more than the {num_heads} heads asked "
            f"for; ask for at least {present}"
        )
    return _open(folder, config, num_heads, sensevoice, audio_model_path, **from_pretrained_kwargs)


def config_with_heads(
    config: PreTrainedConfig, num_heads: int, *, sensevoice: bool = False
) -> Qwen2MTPConfig:
    """The configuration of the model that :func:`load_with_heads` makes from a folder with ``config``."""
    continuous = sensevoice or getattr(config, "continuous_input", False)
    model_class = Qwen2MTPSenseVoiceForCausalLM if continuous else Qwen2MTPForCausalLM
    return _with_heads(config, model_class, num_heads, None)


def locate(path: str | PathLike[str]) -> Path:
    """The local folder of a path or name. Only ``hf://`` uses the network.

    Raises:
        CheckpointError: there is none.
    """
    name = str(path)
    if name.startswith(HUB_PREFIX):
        repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        try:
            return Path(snapshot_download(repository, revision=revision or None, allow_patterns=HUB_FILES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name}: cannot be downloaded: {one_line(error)}") from error
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{name}: a file; give the folder that holds it")
    if isinstance(path, str) and _HUB_NAME.fullmatch(name) and not folder.parent.is_dir():
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            raise CheckpointError(
                f"{name}: no such folder in {Path.cwd()}, and no such model in the Hugging Face cache; "
                f"give a folder, or {HUB_PREFIX}{name} to download the model of that name"
            ) from None
    where = "" if folder.is_absolute() else f" in {Path.cwd()}"
    raise CheckpointError(f"{name}: no such folder{where}")


def check_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: this machine, or this build of PyTorch, has no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device {str(name)!r}: {one_line(error)}") from error
    if device.type == "meta":
        raise ValueError("device 'meta': holds no data; give cpu or cuda")
    return device


def _open(
    folder: Path,
    config: PreTrainedConfig,
    num_heads: int,
    sensevoice: bool = False,
    audio_model_path: str | PathLike[str] | None = None,
    **from_pretrained_kwargs: Any,
) -> Qwen2MTPForCausalLM:
    """Check a folder, load it, and initialize the missing parts."""
    check_weights(folder, config)
    check_vocabulary(folder, config.vocab_size)
    generation_file, useless = useless_sampling_fields(folder)

    continuous = sensevoice or getattr(config, "continuous_input", False)
    model_class = Qwen2MTPSenseVoiceForCausalLM if continuous else Qwen2MTPForCausalLM
    present = getattr(config, "num_nextn_predict_layers", 0)
    sizes = None if audio_model_path is None else read_sizes(audio_model_path).to_dict()
    model, report = _from_pretrained(
        folder,
        model_class,
        _with_heads(config, model_class, num_heads, sizes),
        **from_pretrained_kwargs,
    )
    for name in useless:
        setattr(model.generation_config, name, None)
    if useless:
        logger.warning(
            "%s: %s have no effect without do_sample and are dropped",
            generation_file,
            ", ".join(useless),
        )
    started: list[str] = []
    if continuous:
        started = start_audio_parts(model, set(report["missing_keys"]), audio_model_path)
    grown = range(present, num_heads)
    refuse_other_tensors(model, folder, report, grown, started)
    grow_heads(model, grown)
    return model


def _with_heads(
    config: PreTrainedConfig,
    model_class: type[Qwen2MTPForCausalLM],
    num_heads: int,
    audio_encoder: Mapping[str, Any] | None,
) -> Qwen2MTPConfig:
    """The configuration of a model of ``model_class`` with ``num_heads`` heads on the same backbone."""
    values = config.to_dict()
    values.pop("model_type", None)
    values["num_hidden_layers"] += num_heads - getattr(config, "num_nextn_predict_layers", 0)
    values["num_nextn_predict_layers"] = num_heads
    # One entry a layer: let the configuration fill it in for the new number of layers.
    values.pop("layer_types", None)
    # Training disabled it in the folders it saved; forward disables it itself when labels are given.
    values.pop("use_cache", None)
    if config.model_type != model_class.config_class.model_type:
        values.pop("mtp_detach_backbone", None)  # each family has its own default
    if audio_encoder is not None:
        values.setdefault("audio_encoder", audio_encoder)
    return model_class.config_class(**values)


def _from_pretrained(
    folder: Path, model_class: type[Qwen2MTPForCausalLM], config: PreTrainedConfig, **kwargs: Any
) -> tuple[Qwen2MTPForCausalLM, dict[str, Any]]:
    """The model, and transformers' report of the missing tensors."""
    # transformers would list every tensor of the new heads as missing; we log one line instead.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        loaded: Any = model_class.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refuse_other_tensors refuses these with its own message
            **kwargs,
        )
        model, report = loaded
        return model, report
    except (ImportError, ValueError) as error:
        attention = kwargs.get("attn_implementation")
        if attention is None or not re.search(r"attn_implementation|attention", str(error), re.IGNORECASE):
            raise
        raise CheckpointError(f"attn_implementation={attention!r}: {one_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def start_audio_parts(
    model: Qwen2MTPForCausalLM, missing: set[str], audio_model_path: str | PathLike[str] | None
) -> list[str]:
    """Initialize the audio part that a folder lacks: the encoder from its own weights, the adapter randomly.

    Args:
        missing: names of all parameters that the folder lacks.
        audio_model_path: SenseVoiceSmall's folder; used only if the whole encoder is missing.

    Returns:
        Prefixes of the parameters that were initialized.

    Raises:
        CheckpointError: the encoder is missing and no path is given.
    """
    names = [name for name, _ in model.named_parameters()]
    started = [
        prefix
        for prefix in (_ENCODER_PREFIX, _ADAPTER_PREFIX)
        if missing.issuperset(name for name in names if name.startswith(prefix))
    ]
    if _ENCODER_PREFIX in started:
        if audio_model_path is None:
            raise CheckpointError(
                "the model folder holds no SenseVoice encoder: pass audio_model_path "
                "(--audio_model_name_or_path), the folder of SenseVoiceSmall"
            )
        encoder = model.get_submodule(f"{_ENCODER_PREFIX}model")
        copy_parameters(SenseVoiceEncoder.from_pretrained(audio_model_path), encoder)
    return started


def refuse_other_tensors(
    model: Qwen2MTPForCausalLM, folder: Path, report: Mapping[str, Any], grown: range, started: list[str]
) -> None:
    """Refuse missing, misshapen and extra tensors; only grown heads and initialized parts may be missing.

    Raises:
        CheckpointError: the weights do not match config.json.
    """
    heads = tuple(prefix for k in grown for prefix in head_prefixes(model.config, k))
    expected = (*heads, *started)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(
        name for name in report["missing_keys"] if not name.startswith(expected) and name not in tied
    )
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}; copy the complete folder"
        )
    if report.get("mismatched_keys"):
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise CheckpointError(
            f"{folder}: {name} has shape {tuple(stored)} where config.json asks for {tuple(wanted)}; "
            "use the config.json that belongs to these weights"
        )
    # A head that is about to be grown must not be in the file: growing would overwrite it.
    unclaimed = {name for name, _ in model.named_parameters() if name.startswith(heads)} if heads else set()
    extra = sorted(
        (unclaimed - set(report["missing_keys"])) | (set(report.get("unexpected_keys", ())) - tied)
    )
    if extra:
        raise CheckpointError(
            f"{folder}: {len(extra)} tensors do not belong to the model of config.json, the first is {extra[0]}; use "
            "the config.json that belongs to these weights"
        )
