"""Reads weight files without running code, and checks them key by key."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vita_audio.audio.folders import WeightsError


def find_weights(folder: str | PathLike[str], stem: str) -> Path:
    """``stem.safetensors`` if the folder has it, else ``stem.pt``.

    Raises:
        WeightsError: the folder has neither.
    """
    for suffix in (".safetensors", ".pt"):
        path = Path(folder) / f"{stem}{suffix}"
        if path.is_file():
            return path
    raise WeightsError(f"{folder}: holds neither {stem}.safetensors nor {stem}.pt")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name, on the CPU.

    Raises:
        WeightsError: the file is truncated, or holds anything but a flat dictionary of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, OSError, ValueError) as error:
        summary = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path}: cannot be read, truncated or not a weight file: {summary}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: expected a flat dictionary of tensors")
    return state


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], path: Path, ignore: Iterable[str] = ()
) -> None:
    """Load weights into a module built on the meta device, as frozen float32 tensors.

    Args:
        module: every parameter and persistent buffer is replaced.
        state: tensors by name; must match the module exactly.
        path: source of ``state``, for messages.
        ignore: keys of ``module`` that ``state`` may lack.

    Raises:
        WeightsError: a key is missing, has another shape or is unexpected; the message names the first one in
            the module's order.
    """
    expected = module.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            if key in ignore:
                continue
            raise WeightsError(f"{path}: key {key!r} is missing, expected shape {list(tensor.shape)}")
        if state[key].shape != tensor.shape:
            raise WeightsError(
                f"{path}: key {key!r} has shape {list(state[key].shape)}, "
                f"the configuration asks for {list(tensor.shape)}"
            )
    for key in state:
        if key not in expected:
            raise WeightsError(f"{path}: unexpected key {key!r} of shape {list(state[key].shape)}")
    module.load_state_dict({key: value.float() for key, value in state.items()}, strict=False, assign=True)
    module.requires_grad_(False).eval()
