"""Whether a stage's result can be loaded: asked before the stage is called complete."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from vita_audio import models
from vita_audio.models.checkpoint import check_shards


class ResultError(ValueError):
    """A result that cannot be loaded. The message says what is missing."""


def check_result(folder: str | Path) -> None:
    """Every weight that the config asks for must be there, whole and of its shape.

    Raises:
        ValueError: it is not.
    """
    folder = Path(folder)
    check_shards(folder)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = getattr(models, config.architectures[0])(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, list[int]] = {}
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    bad = sorted(name for name, shape in wanted.items() if stored.get(name) != shape)
    if bad:
        raise ResultError(
            f"{folder}: {len(bad)} of {len(wanted)} weights were not saved whole, the first is {bad[0]} "
            f"({stored.get(bad[0], 'missing')}, not {wanted[bad[0]]}); the last checkpoint holds the training state. "
            "With ZeRO-3 set stage3_gather_16bit_weights_on_model_save"
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
