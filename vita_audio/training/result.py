"""Whether a stage's result can be loaded: asked before the stage is called complete."""

from __future__ import annotations

from pathlib import Path

import torch

from vita_audio import models
from vita_audio.models.folder import check_weights, read_config, read_header, weight_files


class ResultError(ValueError):
    """A result that cannot be loaded. The message says what is missing."""


def check_result(folder: str | Path) -> None:
    """Every weight that the config asks for must be there, whole and of its shape.

    Only headers are read; a model of that shape is built without memory. (Loading the weights would, under ZeRO-3,
    wait for the other processes.)

    Raises:
        ResultError: weights are missing or have another shape.
        CheckpointError: the folder's files cannot be read.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_weights(folder, config)
    (architecture,) = config.architectures or ("Qwen2MTPForCausalLM",)
    with torch.device("meta"):
        model = getattr(models, architecture)(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    stored = {
        name: tuple(tensor.shape)
        for file in weight_files(folder)
        for name, tensor in read_header(file).items()
    }
    bad = sorted(name for name, shape in wanted.items() if stored.get(name) != shape)
    if bad:
        raise ResultError(
            f"{folder}: {len(bad)} of {len(wanted)} weights were not saved whole, the first is {bad[0]} "
            f"({stored.get(bad[0], 'missing')}, not {wanted[bad[0]]}); the last checkpoint holds the training state. "
            "With ZeRO-3 set stage3_gather_16bit_weights_on_model_save"
        )
