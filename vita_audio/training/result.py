"""Checks that a stage's result can be loaded, before the stage is marked as finished."""

from __future__ import annotations

from pathlib import Path

import torch

from vita_audio import models
from vita_audio.models.folder import StoredTensor, read_config, read_header, weight_files


class ResultError(ValueError):
    """A result that cannot be loaded. The message says what is missing."""


def check_result(folder: str | Path) -> None:
    """Check that every weight of the config is present, complete and of the right shape.

    Raises:
        ValueError: a weight is not.
    """
    folder = Path(folder)
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
