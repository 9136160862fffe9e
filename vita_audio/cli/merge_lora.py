"""Merge LoRA adapters into their base: an ordinary model folder, as a stage without LoRA writes it.

    python tools/merge_lora.py OUTPUT_DIR --output_dir MERGED

OUTPUT_DIR is the result of a stage with --lora_r, or one of its checkpoints. The base model is the one that it names,
unless --base gives its new place. The logits of both models on the same tokens are compared, and the largest
difference is printed; it is rounding.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from vita_audio.cli.arguments import command_parser
from vita_audio.files import read_json, write_json
from vita_audio.models import open_tokenizer
from vita_audio.models.folder import CheckpointError
from vita_audio.models.open import locate
from vita_audio.provenance import RUN_FILE
from vita_audio.training.checkpoints import is_complete
from vita_audio.training.model_card import write_model_card

_COMPARED_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Merge a folder.

    Raises:
        CheckpointError: a folder cannot be used, or the base is another model.
    """
    options = parse_options(argv)
    difference, largest = merge(locate(options.folder), Path(options.output_dir), options.base)
    print(
        f"wrote {options.output_dir}: logits of up to {largest:.1f} differ from the adapters' by {difference:.1e}"
    )


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("folder", help="result or checkpoint of a stage with --lora_r")
    parser.add_argument("--output_dir", required=True, help="folder of the merged model; new or empty")
    parser.add_argument("--base", help="base model (default: the one that the folder names)")
    return parser.parse_args(argv)


def merge(folder: Path, output_dir: Path, base: str | None = None) -> tuple[float, float]:
    """Write the merged model.

    Args:
        folder: with adapters.
        output_dir: new or empty.
        base: see :func:`vita_audio.training.lora.open_with_adapter`.

    Returns:
        The largest difference of a logit, and the largest logit.

    Raises:
        CheckpointError: a folder cannot be used.
    """
    from vita_audio.training.lora import open_with_adapter  # PEFT takes seconds to import

    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise CheckpointError(f"--output_dir {output_dir}: is not empty; give a new folder")
    if (folder / "loader_state").is_dir() and not is_complete(folder):
        raise CheckpointError(f"{folder}: this checkpoint was not written completely; give an earlier one")
    adapted = open_with_adapter(folder, base)
    tokenizer = open_tokenizer(folder)
    tokens = torch.arange(_COMPARED_TOKENS)[None] * 997 % adapted.config.vocab_size
    before = _logits(adapted, tokens)
    model = cast(PreTrainedModel, adapted.merge_and_unload())
    difference = (_logits(model, tokens) - before).abs().max().item()
    largest = before.abs().max().item()
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    for name in (
        "config.json",
        "generation_config.json",
    ):  # the run's schedule and loss weight, not the base's
        shutil.copyfile(folder / name, output_dir / name)
    run = read_json(folder / RUN_FILE) | {"merged": {"adapters": str(folder), "logits": difference}}
    write_json(output_dir / RUN_FILE, run)
    write_model_card(output_dir, run)
    return difference, largest


@torch.no_grad()
def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits.float()
