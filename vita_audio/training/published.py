"""Flags of the published training program with built-in behaviour here, and its model configs.

Scripts and JSON files written for it keep working: a flag is accepted if its value describes what this trainer
always does, and any other value is refused in one line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool


@dataclass(frozen=True)
class BuiltIn:
    """A flag with built-in behaviour.

    Attributes:
        accepted: the values that describe the built-in behaviour. None: every value.
        reason: why other values are refused.
    """

    accepted: tuple[bool | str, ...] | None
    reason: str = ""


BUILT_IN: dict[str, BuiltIn] = {
    "reset_attention_mask": BuiltIn((True,), "documents in one row never see each other"),
    "reset_position_ids": BuiltIn(
        (True,), "positions restart with each document; that is what separates them"
    ),
    "create_attention_mask": BuiltIn((False,), "no mask is made: positions separate the documents of a row"),
    "create_attention_mask_2d": BuiltIn(
        (False,), "no mask is made: positions separate the documents of a row"
    ),
    "dataset_joint": BuiltIn((True,), "rows are always packed from several documents"),
    "variable_length": BuiltIn((False,), "rows always have --model_max_length tokens"),
    "cross_dataset_joint": BuiltIn((True,), "documents of all data sets share the rows"),
    "trust_remote_code": BuiltIn((False,), "code in a model folder is never run"),
    "use_fast_tokenizer": BuiltIn((True,), "only fast tokenizers are used"),
    "low_cpu_mem_usage": BuiltIn((True, False)),  # how a model is loaded does not affect the result
    "cache_dir": BuiltIn(None),  # nothing is downloaded
    "model_revision": BuiltIn(
        ("main",), "nothing is downloaded; give that revision's folder in --model_name_or_path"
    ),
    "token": BuiltIn((), "nothing is downloaded; give a folder in --model_name_or_path"),
    "vision_model_name_or_path": BuiltIn((), "this model reads no images"),
    "max_num_frame": BuiltIn(None),
    "max_fps": BuiltIn(None),
    "min_patch_grid": BuiltIn(None),
    "max_patch_grid": BuiltIn(None),
}

_VISION_PREFIXES = ("vision_", "image_")
"""Options for images, which no sample has: every value is accepted."""


def built_in(flag: str) -> BuiltIn | None:
    """How a flag (without dashes, with underscores) is treated; None if it has no built-in behaviour."""
    if flag not in BUILT_IN and flag.startswith(_VISION_PREFIXES):
        return BuiltIn(None)
    return BUILT_IN.get(flag)


def check_built_in(flag: str, values: Sequence[str]) -> None:
    """Check the typed values of a flag with built-in behaviour; no value means true.

    Raises:
        ValueError: a value that differs from the built-in behaviour.
    """
    treated = built_in(flag)
    if treated is None or treated.accepted is None:
        return
    typed = " ".join(values)
    if _parse(typed, treated.accepted) not in treated.accepted:
        raise ValueError(f"--{flag} {typed}".rstrip() + f": {treated.reason}; leave this option out")


def _parse(typed: str, accepted: tuple[bool | str, ...]) -> bool | str:
    if not any(isinstance(value, bool) for value in accepted):
        return typed
    try:
        return string_to_bool(typed or "true")
    except Exception:  # argparse's error class; the value is not a Boolean and is refused as typed
        return typed


# -- model configs --------------------------------------------------------------------------------------------

_CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "models"
_PUBLISHED_NAMES = {f"config_7B_mtp{heads}.json": f"qwen2.5_7b_mtp{heads}.json" for heads in (0, 1, 10)}

_ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def heads_in_config(name: str) -> int:
    """MCTP heads in a model's config: a folder, a JSON file, or the published ``config_7B_mtp10.json``.

    Raises:
        ValueError: no such config, or it cannot be read.
    """
    return int(_read_config(name).get("num_nextn_predict_layers", 0))


def check_architecture(name: str, model_folder: str) -> None:
    """Check that a config describes the model of a folder, except for heads and vocabulary.

    Raises:
        ValueError: a field differs; the message names it.
    """
    model_config = Path(model_folder) / "config.json"
    if not model_config.is_file():
        return  # opening the model reports it
    config, model = _read_config(name), _read_config(str(model_config))
    pairs = {field: (config.get(field), model.get(field)) for field in _ARCHITECTURE if field in config}
    pairs["num_hidden_layers without heads"] = (_backbone_layers(config), _backbone_layers(model))
    pairs["rope_theta"] = (_rope_theta(config), _rope_theta(model))
    for field, (wanted, there) in pairs.items():
        if None not in (wanted, there) and wanted != there:
            raise ValueError(
                f"--config_name {name}: {field} is {wanted}, but {there} in {model_config}; "
                "give the config of that model, or leave this option out"
            )


def _read_config(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file() and path.name in _PUBLISHED_NAMES:
        path = _CONFIG_FOLDER / _PUBLISHED_NAMES[path.name]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config_name {name}: no such folder or JSON file") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); correct the file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object; correct the file")
    return content


def _backbone_layers(config: dict[str, Any]) -> int | None:
    layers = config.get("num_hidden_layers")
    return None if layers is None else int(layers) - int(config.get("num_nextn_predict_layers", 0))


def _rope_theta(config: dict[str, Any]) -> float | None:
    theta = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    return None if theta is None else float(theta)
