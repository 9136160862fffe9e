"""Checks of a model folder before anything is loaded.

transformers opens many folders that are not what the user intended: of two sets of weights it picks one, a LoRA
adapter makes it look for another model, and a truncated file fails after minutes. Here each such folder is refused
in one line that says what was found and what to do. Only headers are read, except where two tensors are compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

ARCHITECTURES = ("qwen2", "qwen2_mtp", "qwen2_mtp_sensevoice")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_TRAINING_STATE = ("training_args.", "optimizer.", "scheduler.", "rng_state")
"""Prefixes of files next to a checkpoint's weights that are not weights themselves."""
_COMPARED_BYTES = 2**24


class CheckpointError(ValueError):
    """A folder cannot be used as a model; the message names the file and what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: bytes ``start`` to ``end`` of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_config(folder: Path, *, adapter: bool = False) -> PreTrainedConfig:
    """The configuration of a Qwen2 language model, with or without heads.

    Args:
        folder: of the model.
        adapter: whether a LoRA adapter's folder may be read.

    Raises:
        CheckpointError: config.json is missing or broken, or describes another architecture, or the folder holds
            an adapter.
    """
    file = folder / "config.json"
    if not adapter:
        _refuse_adapter(folder)
    if not file.is_file():
        raise CheckpointError(f"{file}: not found; give a folder with config.json and safetensors weights")
    model_type = read_object(file).get("model_type")
    if model_type not in ARCHITECTURES:
        raise CheckpointError(
            f"{file}: model_type {model_type!r} is not a Qwen2 language model; use a folder of type "
            f"{', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object; download the file again")
    return content


def check_weights(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse weights that are missing, truncated, ambiguous, or inconsistent with the configuration's LM head.

    Raises:
        CheckpointError: see above.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= read_header(file)
    check_head(folder, tensors, config.tie_word_embeddings)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model.

    Raises:
        CheckpointError: there are none, some are missing, or there are others next to them.
    """
    _refuse_adapter(folder)
    names, index = [WEIGHTS], folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(read_object(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a valid index of weight files; copy it again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if missing:
        if not index.is_file():
            _refuse_other_formats(folder, shards)
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing)}); "
            "copy the complete folder"
        )
    if index.is_file() and WEIGHTS not in names and (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder}: holds two sets of weights, {WEIGHTS} and the {len(names)} files of {INDEX}; "
            "delete the one that is out of date"
        )
    stray = [name for name in shards if name not in names]
    if stray:
        raise CheckpointError(
            f"{folder}: {len(stray)} weight files are left over from another save, the first is {stray[0]}; "
            "delete them, or copy the complete folder again"
        )
    return [folder / name for name in names]


def _refuse_other_formats(folder: Path, shards: Sequence[str]) -> None:
    """Refuse a folder without safetensors under a known name, and report what it holds instead."""
    if shards:
        raise CheckpointError(
            f"{folder}: {len(shards)} weight files without {INDEX}; copy that file from their source"
        )
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(_TRAINING_STATE))
    pickled = [file.name for file in files if file.suffix == ".bin"]
    if pickled:
        raise CheckpointError(
            f"{folder}: weights in {pickled[0]}, a format that is not supported; convert them with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), which writes safetensors"
        )
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        raise CheckpointError(
            f"{folder}: a DeepSpeed checkpoint without {WEIGHTS}; in that folder, run "
            "python zero_to_fp32.py --safe_serialization . . to create it"
        )
    others = [file.name for file in files if file.suffix in (".safetensors", ".gguf", ".pth", ".pt", ".h5")]
    if others:
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}, but {others[0]}, which is not supported; use the model in transformers' format"
        )


def _refuse_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter, and say how it becomes a whole model."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    base = read_object(file).get("base_model_name_or_path")
    merge = (
        f"python tools/merge_lora.py {folder} --output_dir MERGED"
        if (folder / "run.json").is_file()
        else "peft (PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder))"
    )
    raise CheckpointError(f"{file}: a LoRA adapter of {base}, not a whole model; merge it first with {merge}")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose length must match its header; a truncated download's does not.

    Raises:
        CheckpointError: the file is shorter, or not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        try:
            if header_size > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(header_size))
            data = 8 + header_size
            tensors = {
                name: StoredTensor(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    *(data + offset for offset in entry["data_offsets"]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a safetensors file; copy it again") from error
    end = max((tensor.end for tensor in tensors.values()), default=8 + header_size)
    if size < end:
        raise CheckpointError(f"{file}: truncated, {size} of {end} bytes; copy it again")
    return tensors


def check_head(folder: Path, tensors: dict[str, StoredTensor], tied: bool) -> None:
    """Check that the LM head is stored as config.json says: as its own tensor, or as the embedding.

    Raises:
        CheckpointError: it is not.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    config_file = folder / "config.json"
    if not tied and head is None and embedding is not None:
        raise CheckpointError(
            f"{config_file}: tie_word_embeddings is false or missing, but the weights hold no lm_head.weight; set it "
            "to true if this model shares its embedding, else copy the complete folder"
        )
    if tied and head is not None and embedding is not None and not same_content(head, embedding):
        raise CheckpointError(
            f"{config_file}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight; "
            "set it to false to keep this head, or delete the tensor"
        )


def same_content(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors are equal byte for byte."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as a, second.file.open("rb") as b:
        a.seek(first.start)
        b.seek(second.start)
        for offset in range(0, first.end - first.start, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, first.end - first.start - offset)
            if a.read(count) != b.read(count):
                return False
    return True


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Check that the tokenizer stored in the folder, if any, fits the embedding matrix.

    Raises:
        CheckpointError: the tokenizer has more tokens, or cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    content = read_object(file)
    try:
        ids = [token["id"] for token in content.get("added_tokens", ())]
        vocabulary = content.get("model", {}).get("vocab", {})
        ids.extend(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
        needed = max(ids, default=-1) + 1
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a valid tokenizer; download the file again") from error
    if needed > vocab_size:
        raise CheckpointError(
            f"{folder / 'config.json'}: vocab_size {vocab_size} is smaller than the {needed} tokens of "
            f"{file.name}; use the tokenizer this model was trained with"
        )


def useless_sampling_fields(folder: Path) -> tuple[Path, list[str]]:
    """Sampling fields in a file that asks for greedy search, and the name of that file.

    It is generation_config.json, or config.json in older folders. The fields have no effect, but transformers does
    not save a generation config that has them.

    Raises:
        CheckpointError: the generation config cannot be saved for another reason.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        file = folder / "config.json"
    read_object(file)
    try:
        generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name=file.name, local_files_only=True
        )
        useless = [name for name in SAMPLING_FIELDS if getattr(generation_config, name, None) is not None]
        useless = [] if generation_config.do_sample else useless
        for name in useless:
            setattr(generation_config, name, None)
        generation_config.validate(strict=True)
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{file}: {one_line(error)}; correct this field") from error
    return file, useless


def one_line(error: Exception) -> str:
    """The first informative sentence of a message, without line breaks."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    # Validation messages of transformers and huggingface_hub open with a title that ends in a colon.
    telling = [line for line in lines if not line.endswith(":")] or lines or [type(error).__name__]
    return telling[0].rstrip(".")
