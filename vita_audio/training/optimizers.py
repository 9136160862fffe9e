"""AdamW of the parameter groups: PyTorch's, or with eight-bit moments by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit")
"""transformers' names for ``--optim``; the first two are the same."""
EIGHT_BIT_MOMENTS = 2 + 2 * 4 / 256
"""Bytes of a parameter's two moments: a byte each, and a float32 scale for 256 of them."""


def check_optimizer(name: str, *, use_cpu: bool, deepspeed_builds: bool) -> None:
    """Refuse an eight-bit optimizer that could not be made or would not be used.

    Raises:
        ValueError: the message says what to do.
    """
    if name not in EIGHT_BIT:
        return
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"--optim {name} needs bitsandbytes: pip install bitsandbytes, or give adamw_torch")
    if use_cpu:
        raise ValueError(f"--optim {name}: its kernels need a GPU; give adamw_torch")
    if deepspeed_builds:
        raise ValueError(
            f"--optim {name}: the DeepSpeed config builds another optimizer; use one without an optimizer section "
            "(ds_config_zero2_no_optimizer.json)"
        )


def build_optimizer(
    name: str, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of ``--optim``.

    Args:
        groups: parameters, each group with its ``lr`` and ``weight_decay``.
    """
    if name in EIGHT_BIT:
        from bitsandbytes import optim

        kind = optim.PagedAdamW8bit if name.startswith("paged") else optim.AdamW8bit
        eight_bit: torch.optim.Optimizer = kind(groups, betas=betas, eps=eps)
        return eight_bit
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=device.type == "cuda")
