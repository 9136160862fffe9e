"""One step of preflight on random rows, and the comparison of two of them."""

from __future__ import annotations

import gc
import math
import time
from typing import Any

import torch

from vita_audio.constants import IGNORE_INDEX

TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.02, torch.float32: 1e-3}
"""Largest relative difference of two losses that should be equal."""
DOCUMENT = 512
"""Tokens in each document of a row."""

StepResult = tuple[float, float, float, torch.Tensor]
"""Loss, norm of the gradients, seconds, and hidden states (1, time, d) of the backbone."""


class CheckFailed(ValueError):
    """A check that has found a fault; the message is one line."""


def one_loss(model: Any, length: int, device: torch.device) -> Any:
    """The loss of a row of random documents."""
    ids, positions = random_row(model, length, device)
    labels = ids.masked_fill(positions < min(DOCUMENT, length) // 2, IGNORE_INDEX)
    return model(input_ids=ids, position_ids=positions, labels=labels).loss


def random_row(model: Any, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions (1, length)."""
    positions = (torch.arange(length, device=device) % DOCUMENT)[None]
    return torch.randint(min(model.config.vocab_size, 1000), (1, length), device=device), positions


def one_step(model: Any, length: int, device: torch.device) -> StepResult:
    """Loss, norm of the gradients, seconds, and hidden states of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = one_loss(model, length, device)
    loss.backward()
    norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(norms).norm().item()  # waits for the device
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    gc.collect()
    with torch.no_grad():  # wrong attention may hardly move the loss of an untrained model
        ids, positions = random_row(model, length, device)
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return loss.item(), norm, seconds, hidden


def compare(
    name: str,
    result: StepResult,
    other: str,
    reference: StepResult,
    dtype: torch.dtype,
) -> None:
    """Refuse back ends whose losses or gradients differ.

    Raises:
        CheckFailed: they do.
    """
    tolerance = TOLERANCE[dtype]
    close(f"the loss with {name} attention", result[0], f"with {other}", reference[0], tolerance)
    close(f"the gradient norm with {name} attention", result[1], f"with {other}", reference[1], 5 * tolerance)
    hidden, want = result[3].float(), reference[3].float()
    size = want.norm().item()
    close(
        f"the hidden states with {name} attention: their norm and difference",
        size + (hidden - want).norm().item(), f"with {other}", size, 3 * tolerance,
    )  # fmt: skip


def close(name: str, value: float, other: str, reference: float, tolerance: float) -> None:
    """Refuse numbers that differ by more than a share, or that are not finite.

    Raises:
        CheckFailed: they do.
    """
    if not math.isclose(value, reference, rel_tol=tolerance):
        raise CheckFailed(
            f"{name} is {float(value):.5g}, but {float(reference):.5g} {other}; do not train with it"
        )
