"""The published learning-rate schedule: logarithmic warm-up, then a cosine to a tenth of the peak.

The published runs leave the schedule to DeepSpeed's ``WarmupCosineLR``, whose warm-up is logarithmic unless its
config overrides that: after a tenth of 240 warm-up steps the rate is 0.58 of the peak, where a linear warm-up
has 0.10. DeepSpeed builds its scheduler only from its own config file; here it is a plain PyTorch scheduler, so
``--lr_scheduler_type`` selects it like any other, even if DeepSpeed builds the optimizer. Every parameter group
keeps its own peak and all groups follow the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, get_scheduler

WARMUP_COSINE = "warmup_cosine"
"""The name of the published schedule in ``--lr_scheduler_type``."""

SCHEDULER_NAMES = (WARMUP_COSINE, *(kind.value for kind in SchedulerType))

WARMUP_TYPES = ("log", "linear")


def build_scheduler(
    name: str,
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    arguments: Any = None,
) -> LRScheduler:
    """The schedule of that name: the published one, or one of transformers'.

    Raises:
        TypeError, ValueError: ``arguments`` do not fit the schedule.
    """
    arguments = dict(arguments or {})
    if name == WARMUP_COSINE:
        return LambdaLR(optimizer, warmup_cosine(warmup_steps, total_steps, **arguments))
    return get_scheduler(name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=arguments)


def warmup_cosine(
    warmup_steps: int,
    total_steps: int,
    *,
    warmup_min_ratio: float = 0.0,
    cos_min_ratio: float = 0.1,
    warmup_type: str = "log",
) -> Callable[[int], float]:
    """The curve of DeepSpeed's ``WarmupCosineLR``: maps an optimizer step, from 0, to a fraction of the peak rate.

    Args:
        warmup_steps: fewer than 2 count as 2, as in DeepSpeed.
        total_steps: the curve stays at ``cos_min_ratio`` from here on.
        warmup_min_ratio: fraction of the peak at the start of the warm-up.
        cos_min_ratio: fraction of the peak at the end of the cosine.
        warmup_type: ``log`` or ``linear``.

    Raises:
        ValueError: a ratio outside 0 to 1, or an unknown ``warmup_type``.
    """
    for field, value in (("warmup_min_ratio", warmup_min_ratio), ("cos_min_ratio", cos_min_ratio)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{field} {value!r}: give a fraction of the peak between 0 and 1")
    if warmup_type not in WARMUP_TYPES:
        raise ValueError(f"warmup_type {warmup_type!r}: give {' or '.join(WARMUP_TYPES)}")
    # A partial of a module-level function instead of a closure, so the scheduler can be pickled.
    return partial(
        _share_of_peak,
        warmup_steps=max(2, warmup_steps),
        total_steps=total_steps,
        warmup_min_ratio=warmup_min_ratio,
        cos_min_ratio=cos_min_ratio,
        warmup_type=warmup_type,
    )


def _share_of_peak(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    warmup_min_ratio: float,
    cos_min_ratio: float,
    warmup_type: str,
) -> float:
    if step == 0:  # DeepSpeed's scheduler has not started yet; its first update has rate 0.
        return 0.0
    done = step - 1
    if done < warmup_steps:
        rise = math.log(done + 1) / math.log(warmup_steps) if warmup_type == "log" else done / warmup_steps
        return warmup_min_ratio + rise * (1 - warmup_min_ratio)
    progress = min(1.0, (done - warmup_steps + 1) / max(1, total_steps - warmup_steps))
    return cos_min_ratio + (1 - cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2
