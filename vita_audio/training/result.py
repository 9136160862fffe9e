"""Checks that a result can be loaded, before its stage is marked as finished, and a checkpoint, before a run resumes.

A checkpoint is marked when it is complete, and may be damaged later. transformers ignores a missing optimizer and
missing weights, so the run would continue with fresh moments, or with the base model's weights.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from vita_audio import models
from vita_audio.models.folder import StoredTensor, read_config, read_header, weight_files

_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_READ_WHOLE = 2**26
"""Bytes of the largest file of which every byte is checked."""


class ResultError(ValueError):
    """A result that cannot be loaded. The message says what is missing."""


def check_result(folder: str | Path) -> None:
    """Check that every weight of the config, or all that LoRA trained, is present, complete and of the right shape.

    Raises:
        ValueError: a weight is not.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        from vita_audio.training.lora import check_adapter_folder  # PEFT takes seconds to import

        check_adapter_folder(folder)
        return
    config = read_config(folder)
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        stored |= read_header(file)
    with torch.device("meta"):
        model = getattr(models, (config.architectures or ["Qwen2MTPForCausalLM"])[0])(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    bad = sorted(name for name, shape in wanted.items() if name not in stored or stored[name].shape != shape)
    if bad:
        found = (
            f"has shape {stored[bad[0]].shape}, not {wanted[bad[0]]}" if bad[0] in stored else "is missing"
        )
        raise ResultError(
            f"{folder}: {len(bad)} of {len(wanted)} weights were not saved correctly, the first is {bad[0]}, which "
            f"{found}; the last checkpoint holds the training state. With ZeRO-3 set "
            "stage3_gather_16bit_weights_on_model_save"
        )


def check_checkpoint(checkpoint: str | Path, *, deepspeed: bool) -> None:
    """Check that a checkpoint holds everything a run needs to continue, and that no file is truncated.

    Args:
        checkpoint: its folder.
        deepspeed: whether DeepSpeed reads it.

    Raises:
        ResultError: a file is missing or truncated; the message names it and what to do.
    """
    checkpoint = Path(checkpoint)
    problem = _problem_of_training_state(checkpoint, deepspeed)
    if problem is None:
        try:
            check_result(checkpoint)
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem is not None:
        raise ResultError(f"{problem}; delete {checkpoint} to continue from the one before it")


def _problem_of_training_state(checkpoint: Path, deepspeed: bool) -> str | None:
    needed = (
        [checkpoint / "latest"] if deepspeed else [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    )
    for file in needed:
        if not file.is_file():
            return f"{file}: not found"
    if deepspeed:
        named = needed[0].read_text(encoding="utf-8", errors="replace").strip()
        if not named or not (checkpoint / named).is_dir():
            return f"{needed[0]}: names {named!r}, which does not exist"
    for file in sorted(checkpoint.rglob("*")):
        # Nothing reads training_args.bin.
        if file.suffix in _TORCH_SUFFIXES and file.name != "training_args.bin" and not _is_whole(file):
            return f"{file}: damaged or truncated"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file that torch.save wrote, a ZIP archive, is complete; of a large one only the end is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            return file.stat().st_size > _READ_WHOLE or archive.testzip() is None
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
