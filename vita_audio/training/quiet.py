"""Hides library messages about internals that a user of a training run cannot act on.

Each entry below names one message and why it does not concern the user. Everything else is still shown.
"""

from __future__ import annotations

import logging
import os
import re
import warnings

import torch

LIBRARY_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # torchdata 0.11 calls a function that torch 2.13 has deprecated.
    (UserWarning, r"'set_vital' is deprecated"),
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated.
    (FutureWarning, r"`?torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)`? is deprecated"),
)
"""Python warnings by category and the start of their text (a regular expression)."""

LIBRARY_LOG_LINES: dict[str, tuple[str, ...]] = {
    "transformers.modeling_utils": (
        # How rows are initialised when the vocabulary grows: part of the recipe, and followed by training.
        r"The new (embeddings|lm_head weights) will be initialized from a multivariate normal distribution",
    ),
    "transformers.trainer_utils": (
        # The tokenizer's end and padding tokens are written into the config, as they should be.
        r"The tokenizer has new PAD/BOS/EOS tokens",
        # A resumed run uses its own options, and logs those that differ from the checkpoint's.
        r"Warning: The following arguments do not match",
    ),
}
"""Log messages by logger and the start of their text (a regular expression)."""


def hush_libraries() -> None:
    """Hide the messages listed in this file, in this process. Calling it again changes nothing."""
    for category, text in LIBRARY_WARNINGS:
        warnings.filterwarnings("ignore", message=text, category=category)
    for name, texts in LIBRARY_LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _HideLines) for known in logger.filters):
            logger.addFilter(_HideLines(texts))
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed warns that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


class _HideLines(logging.Filter):
    """Drops records that start with one of the given texts."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self._pattern = re.compile("|".join(texts))

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None
