"""A validation set: the first samples of a mix, packed once, the same for the whole run.

The ranks share the samples and get equally many batches, since a partitioned model needs all of them for each pass;
a rank without rows gets padding. On another number of ranks the samples are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vita_audio.chat import Conversation, SampleError, locate, parse_sample, prompts
from vita_audio.data.config import DataConfig
from vita_audio.data.loader import Document, PackedRows, open_packed_rows
from vita_audio.data.packing import RowPacker
from vita_audio.data.report import Report
from vita_audio.data.speech import CodecSpec
from vita_audio.distributed import gather_objects

logger = logging.getLogger(__name__)

SPOKEN_TASKS = ("TTS", "speech QA")
"""Tasks whose requests the model answers aloud."""


@dataclass(frozen=True)
class ValidationSet:
    """What is scored.

    Attributes:
        batches: of this rank, as the train loader makes them.
        kinds: source and task of each number in a batch's ``kinds``.
        requests: the first requests of :data:`SPOKEN_TASKS`, in turn, the same on all ranks.
    """

    batches: list[dict[str, Any]]
    kinds: list[tuple[str, str]]
    requests: list[Conversation]


def read_validation_set(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodecSpec | Any | None,
    *,
    samples: int,
    requests: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ValidationSet:
    """Read and pack a validation mix. All ranks must call it.

    Args:
        config: as for :func:`vita_audio.data.build_train_loader`.
        tokenizer: as there.
        codec: as there.
        samples: how many are scored, of all ranks together.
        requests: how many are answered aloud.

    Raises:
        MixError, TokenCacheError, MachineError: as for the train loader.
        ValueError: no sample can be used; or tokenizer and codec do not match.
    """
    rows, _ = open_packed_rows(config, tokenizer, codec, rank, world_size, seed=0)
    positions = range(min(samples, len(rows.mix)))
    report = Report()
    read = (rows.read(rows.mix.place(position), report) for position in positions[rank::world_size])
    batches = _pack([document for document in read if document is not None], rows)
    counts = gather_objects((len(batches), report.skipped.total(), report.used.total()))
    if not sum(used for _, _, used in counts):
        raise ValueError(f"{config.dataset_path}: no sample can be used:\n{report.summary()}")
    if any(skipped for _, skipped, _ in counts):
        logger.warning("%s: %d samples are left out", config.dataset_path, sum(count[1] for count in counts))
    most = max(count for count, _, _ in counts)
    batches += [_collate([], rows) for _ in range(most - len(batches))]
    return ValidationSet(batches, rows.kinds, _requests(rows, positions, requests))


def _pack(documents: Sequence[Document], rows: PackedRows) -> list[dict[str, Any]]:
    packer: RowPacker[Document] = RowPacker(rows.config.seq_length)
    full = (packer.add(document, len(document.example)) for document in documents)
    packed = [row for row in full if row is not None]
    packed += packer.flush()
    size = rows.config.micro_batch_size
    return [_collate(packed[start : start + size], rows) for start in range(0, len(packed), size)]


def _collate(packed: list[list[Document]], rows: PackedRows) -> dict[str, Any]:
    return rows.collate(packed or [[]])


def _requests(rows: PackedRows, positions: range, wanted: int) -> list[Conversation]:
    """The first of each task in turn."""
    found: dict[str, list[Conversation]] = {task: [] for task in SPOKEN_TASKS}
    for position in positions:
        if all(len(requests) >= wanted for requests in found.values()):
            break
        place = rows.mix.place(position)
        try:
            folder = rows.mix.specs[place.source].path.parent
            sample = locate(parse_sample(rows.mix.raw(place)), rows.config.root, folder)
            task = prompts.task_of(sample)
            if task in found and len(found[task]) < wanted:
                found[task].append(prompts.from_sample(sample))
        except SampleError:  # counted where it is read for scoring
            continue
    turns = [requests[turn] for turn in range(wanted) for requests in found.values() if turn < len(requests)]
    return turns[:wanted]
