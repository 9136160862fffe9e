"""Packed documents to tensors.

A row is the concatenation of its documents. Positions restart at 0 in each, which is how the model
tells them apart. Padding follows, and its positions continue to count (section 6 of the data specification).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from vita_audio.chat import Example
from vita_audio.constants import IGNORE_INDEX


def collate_rows(
    rows: Sequence[Sequence[Example]],
    seq_length: int,
    pad_token_id: int,
    kinds: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Make a batch.

    Args:
        rows: the documents of each row.
        seq_length: tokens in a row.
        pad_token_id: fills the rest.
        kinds: for each document a number that tells what it is, see :attr:`vita_audio.data.TrainLoader.kinds`.

    Returns:
        ``input_ids``, ``labels`` (not shifted), ``position_ids`` and, if given, ``kinds`` of the document at
        each position (0 in the padding): int64, shape (rows, seq_length).
        If a document has continuous audio, also ``audios``, a list of (frames, feature_dim), and
        ``audio_indices``, a list of (2, 1, frames + 4): batch row and position of each feature.

    Raises:
        ValueError: the documents of a row do not fit it.
    """
    batch: dict[str, Any] = {
        "input_ids": _pad(rows, seq_length, pad_token_id, lambda document: document.input_ids),
        "labels": _pad(rows, seq_length, IGNORE_INDEX, lambda document: document.labels),
        "position_ids": torch.stack([_positions(documents, seq_length) for documents in rows]),
    }
    if kinds is not None:
        batch["kinds"] = torch.stack([_kinds(*pair, seq_length) for pair in zip(rows, kinds, strict=True)])
    audios, audio_indices = [], []
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            audios += document.features
            audio_indices += document.audio_indices(row, start)
            start += len(document)
    if audios:
        batch["audios"], batch["audio_indices"] = audios, audio_indices
    return batch


def _pad(rows: Sequence[Sequence[Example]], seq_length: int, value: int, field: Any) -> torch.Tensor:
    padded = torch.full((len(rows), seq_length), value, dtype=torch.long)
    for row, documents in zip(padded, rows, strict=True):
        ids = torch.tensor(list(chain.from_iterable(map(field, documents))), dtype=torch.long)
        if len(ids) > seq_length:
            raise ValueError(f"documents of {len(ids)} tokens do not fit a row of {seq_length}")
        row[: len(ids)] = ids
    return padded


def _positions(documents: Sequence[Example], seq_length: int) -> torch.Tensor:
    positions = torch.arange(seq_length)
    start = 0
    for document in documents:
        positions[start:] = torch.arange(seq_length - start)
        start += len(document)
    return positions


def _kinds(documents: Sequence[Example], kinds: Sequence[int], seq_length: int) -> torch.Tensor:
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.long)
    filled = torch.repeat_interleave(torch.tensor(list(kinds), dtype=torch.long), lengths)
    return torch.nn.functional.pad(filled, (0, seq_length - len(filled)))
