"""SenseVoice folders: sizes and weights of an encoder, in every published form.

Weights are ``model.safetensors`` or ``model.pt``; FunASR nests the latter under
``state_dict``, ``model_state_dict`` or ``model`` and may prefix its names. Sizes come from
our own JSON file or from ``encoder_conf`` in FunASR's ``config.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

_WEIGHT_NAMES = ("model.safetensors", "encoder_weights.safetensors", "model.pt")
_CONFIG_NAMES = ("config.json", "encoder_config.json", "config.yaml")
_NESTINGS = ("state_dict", "model_state_dict", "model")
# Every encoder has this parameter; the part before it is the prefix of all names.
_LANDMARK = "encoder.after_norm.weight"
_QUERY_TABLE, _CTC_BIAS = "embed.weight", "ctc.ctc_lo.bias"

# FunASR settings that select a network; only this one is implemented.
_FIXED_SETTINGS = {"input_layer": "pe", "normalize_before": True, "selfattention_layer_type": "sanm"}


@dataclass(frozen=True)
class SenseVoiceEncoderConfig:
    """Sizes of an encoder; the defaults are SenseVoiceSmall's (SPEC 3.4)."""

    input_size: int = 560
    output_size: int = 512
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 50
    tp_blocks: int = 20
    kernel_size: int = 11
    sanm_shift: int = 0
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    query_embedding_rows: int = 16
    ctc_vocab_size: int = 25055

    def __post_init__(self) -> None:
        if self.output_size % self.attention_heads:
            raise ValueError(
                f"audio encoder: output_size {self.output_size} is not a multiple of "
                f"attention_heads {self.attention_heads}"
            )
        if self.num_blocks < 1 or self.tp_blocks < 0 or self.kernel_size < 1:
            raise ValueError(
                "audio encoder: num_blocks and kernel_size must be at least 1, tp_blocks at least 0"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SenseVoiceEncoderConfig:
        """From FunASR's names; settings that are not sizes of this network are ignored.

        Raises:
            ValueError: the settings describe another network.
        """
        for name, expected in _FIXED_SETTINGS.items():
            if settings.get(name, expected) != expected:
                raise ValueError(
                    f"audio encoder: {name} is {settings[name]!r}; only {expected!r} is supported"
                )
        settings = dict(settings)
        if "sanm_shfit" in settings:  # FunASR's spelling
            settings["sanm_shift"] = settings.pop("sanm_shfit")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    def to_dict(self) -> dict[str, object]:
        """FunASR's names, as :meth:`from_dict` reads them."""
        settings = asdict(self)
        settings["sanm_shfit"] = settings.pop("sanm_shift")
        return settings | _FIXED_SETTINGS


def read_config(path: str | PathLike[str]) -> SenseVoiceEncoderConfig:
    """Sizes stated in a folder; they default to SenseVoiceSmall's.

    Raises:
        ValueError: the file cannot be read or describes another network.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    for name in _CONFIG_NAMES:
        file = folder / name
        if file.is_file():
            try:
                settings = yaml.safe_load(file.read_text())  # JSON is YAML too
            except yaml.YAMLError as error:
                raise ValueError(f"{file}: not readable as a configuration: {error}") from None
            if not isinstance(settings, Mapping):
                raise ValueError(f"{file}: expected a mapping of encoder settings")
            return SenseVoiceEncoderConfig.from_dict(settings.get("encoder_conf", settings))
    return SenseVoiceEncoderConfig()


def read_sizes(path: str | PathLike[str]) -> SenseVoiceEncoderConfig:
    """All sizes of the encoder in a folder, including those determined only by the weights.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: they are not a SenseVoice encoder's.
    """
    return sizes_from_weights(read_config(path), read_weights(path))


def sizes_from_weights(
    config: SenseVoiceEncoderConfig, weights: Mapping[str, torch.Tensor]
) -> SenseVoiceEncoderConfig:
    """``config`` completed with the sizes that FunASR's file does not state."""
    rows, input_size = weights[_QUERY_TABLE].shape
    return replace(
        config,
        query_embedding_rows=rows,
        input_size=input_size,
        ctc_vocab_size=len(weights[_CTC_BIAS]),
    )


def read_weights(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """Weights of a folder or file, under the names of :class:`SenseVoiceEncoder`.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: they are not a SenseVoice encoder's.
    """
    file = _find_weights(Path(path))
    if file.suffix == ".safetensors":
        weights = load_file(file)
    else:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for nesting in _NESTINGS:
            weights = weights.get(nesting, weights)
    prefix = next((name.removesuffix(_LANDMARK) for name in weights if name.endswith(_LANDMARK)), None)
    if prefix is None:
        raise ValueError(f"{file}: not a SenseVoice encoder: it has no parameter {_LANDMARK}")
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    missing = [name for name in (_QUERY_TABLE, _CTC_BIAS) if name not in weights]
    if missing:
        raise ValueError(f"{file}: not a SenseVoice model: it has no parameter {missing[0]}")
    return weights


def write_encoder(
    path: str | PathLike[str], config: SenseVoiceEncoderConfig, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    for name in _WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{path}: no SenseVoice weights there; expected one of {', '.join(_WEIGHT_NAMES)}"
    )
