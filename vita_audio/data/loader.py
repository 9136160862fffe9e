"""The training loader: from a data mix to full rows, deterministic for a seed, resumable to the row.

    mix → (shard of this rank and worker) → sample → document → packer → row → batch

All of this happens in workers that ``torchdata``'s StatefulDataLoader runs. Each batch carries its worker's
state to the main process, so :meth:`TrainLoader.state_dict` describes the last batch that the trainer
received, not how far ahead the workers are. docs/data.md explains why torchdata was chosen over grain.

Workers start from a fork server: the trainer's process has threads (OpenMP, CUDA, gloo) whose locks a
plain fork would copy in an arbitrary state, and spawning would repeat all imports in each worker.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from vita_audio.chat import (
    ChatTokens,
    Example,
    Reason,
    SampleError,
    build_example,
    locate,
    parse_sample,
    prompts,
)
from vita_audio.data.checks import DataIdentity, check_codec, check_ranks_agree
from vita_audio.data.collator import collate_rows
from vita_audio.data.config import DataConfig
from vita_audio.data.faults import MachineError, first_line, machine_fault
from vita_audio.data.mixing import Mix, Place, read_mix
from vita_audio.data.packing import OpenRow, RowPacker
from vita_audio.data.report import ErrorFile, FileJudge, Report
from vita_audio.data.sharding import ShardState, reshard
from vita_audio.data.speech import CodecSpec, SpeechReader, check_codec_matches, codec_fingerprint
from vita_audio.data.token_cache import TokenCache
from vita_audio.data.workers import set_up_worker

logger = logging.getLogger(__name__)

_STATE_VERSION = 1
_ERRORS_BEFORE_NOTICE = 64
"""A worker that finds this many bad samples reports them even without a full batch."""


class ResumeError(ValueError):
    """A loader state that this run cannot continue from."""


def build_train_loader(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodecSpec | Any | None,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 42,
    output_dir: str | Path | None = None,
) -> TrainLoader:
    """Open a mix for training.

    Args:
        config: what to read.
        tokenizer: extended by :func:`vita_audio.chat.extend_tokenizer`.
        codec: a spec, opened by each worker on first use; or an open codec that can be pickled. None: text
            only.
        rank: of this process.
        world_size: number of processes that share the mix.
        seed: seed of all shuffling; the same on every rank.
        output_dir: folder for ``data_errors.jsonl``.

    Raises:
        MixError: the mix cannot be used.
        TokenCacheError: the token cache cannot be used.
        MachineError: the disk or the Arrow cache failed.
        ValueError: tokenizer and codec do not match, or the mix needs a codec that does not open.
    """
    rows, identity = open_packed_rows(config, tokenizer, codec, rank, world_size, seed)
    return TrainLoader(config, rows, ErrorFile(output_dir), identity)


def open_packed_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    codec: CodecSpec | Any | None,
    rank: int,
    world_size: int,
    seed: int,
) -> tuple[PackedRows, DataIdentity]:
    """The rows of a mix, and what identifies their content; see :func:`build_train_loader`."""
    if codec is not None:
        check_codec_matches(codec, ChatTokens.of(tokenizer).context is not None)
    specs = read_mix(config.dataset_path, config.root)
    mix = Mix(specs, seed, strict=config.strict, cache_dir=config.arrow_cache)
    reader, settings = None, {"seed": str(seed), "row length": str(config.seq_length)}
    if codec is not None:
        cache = None
        if config.token_cache is not None:
            cache = TokenCache.find(
                config.token_cache, codec.kind, codec_fingerprint(codec), config.arrow_cache
            )
            settings["token cache"] = cache.fingerprint
        reader = SpeechReader(codec, cache, config.root, config.longest_clip)
        if check_codec(mix, reader, config.root):
            settings["codec"] = f"{codec.kind} {codec_fingerprint(codec)}"
    identity = DataIdentity.of(mix, settings)
    return PackedRows(config, mix, tokenizer, reader, rank, world_size), identity


class TrainLoader:
    """An endless, resumable stream of batches. Made by :func:`build_train_loader`.

    Iterating yields the dicts of :func:`vita_audio.data.collator.collate_rows`, epoch after epoch, each
    in a new order. It raises :class:`vita_audio.data.report.TooManyBadSamples` if the mix, or one of its files,
    has too many bad samples, and :class:`vita_audio.data.faults.MachineError` if the machine fails.
    """

    def __init__(
        self, config: DataConfig, rows: PackedRows, errors: ErrorFile, identity: DataIdentity
    ) -> None:
        self._config = config
        self._rows = rows
        self._errors = errors
        self._identity_of_data = identity
        self._ranks_agree = rows.world_size == 1
        self._report = Report()
        self._judge = FileJudge({state.path: state.rows for state in rows.mix.files})
        self._loader = self._start_workers(rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.check_ranks_agree()
        for batch, report in self._loader:
            if report.fault is not None:
                raise MachineError(report.fault)
            self._report.add(report)
            self._errors.write(report.errors)
            self._judge.check(report)
            self._report.check(self._config.max_error_share, len(self._rows.mix))
            if batch is not None:
                yield batch

    @property
    def mix(self) -> Mix:
        """The data mix behind the rows."""
        return self._rows.mix

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Source and task of each number in a batch's ``kinds``."""
        return self._rows.kinds

    def check_ranks_agree(self) -> None:
        """Compare mix, token cache and codec with those of the other ranks.

        Iterating does this as well; a trainer calls it before it loads a model. All ranks must call it.

        Raises:
            MixError: they differ; the message names the rank and what it lacks.
        """
        if not self._ranks_agree:
            check_ranks_agree(self._identity_of_data)
            self._ranks_agree = True

    @property
    def report(self) -> Report:
        """Counts of this rank over the whole run, by source and reason."""
        return self._report

    def counts(self) -> dict[str, float]:
        """Counts of this rank, for logging.

        ``epoch``, ``used``, ``skipped``, ``skipped/REASON``, ``speech/ORIGIN``, and ``tokens`` and ``positions`` of
        the rows, without and with padding.
        """
        report = self._report
        reasons: dict[str, float] = {}
        for (_, reason), count in report.skipped.items():
            reasons[f"skipped/{reason}"] = reasons.get(f"skipped/{reason}", 0) + count
        return {
            "epoch": report.position / len(self._rows.mix),
            "used": report.used.total(),
            "skipped": report.skipped.total(),
            "tokens": report.tokens,
            "positions": report.positions,
            **reasons,
            **{f"speech/{origin}": count for origin, count in report.speech.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was yielded: small, and serialisable as JSON."""
        return {
            "version": _STATE_VERSION,
            **self._identity(),
            "counts": self._report.to_dict(),
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from a state. Call it before the first batch is requested.

        Args:
            state: this rank's state, from a run of the same world size, or those of all ranks, from a run of
                any size. With the same numbers of ranks and workers the same rows follow as without the
                interruption; otherwise the same samples do, none repeated and none lost.

        Raises:
            ResumeError: the state belongs to another mix, seed or row length, a file has changed, states are
                missing, or it is no state.
        """
        try:
            self._continue([state] if isinstance(state, dict) else list(state))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ResumeError(
                f"the place in the data is damaged ({first_line(error)}); delete this checkpoint to continue from the "
                "one before it"
            ) from error

    def _continue(self, states: list[dict[str, Any]]) -> None:
        for one in states:
            self._check_state(one)
            if not _shards_of([one]):
                raise KeyError("shard")
        rank, world_size = self._rows.rank, self._rows.world_size
        if len(states) == world_size:
            states = [one for one in states if one["rank"] == rank]
        same_ranks = len(states) == 1 and states[0]["world_size"] == world_size and states[0]["rank"] == rank
        if not same_ranks and {one["rank"] for one in states} != set(range(states[0]["world_size"])):
            raise ResumeError(
                f"this is rank {rank} of {world_size}, the state belongs to rank {states[0]['rank']} of "
                f"{states[0]['world_size']}; give the states of all ranks to change the number of ranks"
            )
        if same_ranks and states[0]["num_workers"] == self._config.num_workers:
            self._loader.load_state_dict(states[0]["loader"])
        else:
            self._loader = self._start_workers(self._rows.continuing(_shards_of(states), one_rank=same_ranks))
        # Totals are kept: on each rank if the ranks match, else on the first.
        self._report = Report()
        if same_ranks or rank == 0:
            for one in states:
                self._report.add(Report.from_dict(one["counts"]))

    def _check_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ResumeError(f"loader state of version {state.get('version')}, expected {_STATE_VERSION}")
        mine = self._identity()
        for field, meaning in (("mix", "data mix or seed"), ("seq_length", "row length")):
            if state[field] != mine[field]:
                raise ResumeError(
                    f"the checkpoint was made with another {meaning} ({state[field]}, now {mine[field]}); "
                    "restore it, or start the stage in an empty folder"
                )
        # Checkpoints of earlier versions do not state the contents.
        now = self._rows.mix.in_use
        for file, content in zip(now, state.get("contents", [file.content for file in now]), strict=True):
            if file.content != content:
                raise ResumeError(
                    f"{file.path}: its content has changed since the checkpoint was made; restore it, or start the "
                    "stage in an empty folder"
                )

    def _identity(self) -> dict[str, Any]:
        return {
            "rank": self._rows.rank,
            "world_size": self._rows.world_size,
            "num_workers": self._config.num_workers,
            "seq_length": self._config.seq_length,
            "mix": self._rows.mix.order_fingerprint,
            "contents": [file.content for file in self._rows.mix.in_use],
        }

    def _start_workers(self, rows: PackedRows) -> StatefulDataLoader:
        workers = self._config.num_workers
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
        return StatefulDataLoader(
            rows,
            batch_size=None,  # rows are batched, so a report may arrive without a batch
            num_workers=workers,
            worker_init_fn=set_up_worker if workers else None,
            multiprocessing_context=context if workers else None,
        )


class PackedRows(IterableDataset):
    """One shard: reads its samples and yields ``(batch or None, report)``."""

    def __init__(
        self,
        config: DataConfig,
        mix: Mix,
        tokenizer: PreTrainedTokenizerBase,
        reader: SpeechReader | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.config = config
        self.mix = mix
        self.tokenizer = tokenizer
        self.reader = reader
        self.rank = rank
        self.world_size = world_size
        self._starts: dict[int, ShardState] = {}
        self._state: dict[str, Any] | None = None

    def continuing(self, old: list[ShardState], *, one_rank: bool) -> PackedRows:
        """The same rows, continuing the work of other shards.

        Args:
            old: shards of a whole earlier run; with ``one_rank``, of this rank only.
            one_rank: whether the other ranks keep their own shards.
        """
        workers = max(1, self.config.num_workers)
        ranks = [self.rank] if one_rank else range(self.world_size)
        owners = [(rank, worker) for worker in range(workers) for rank in ranks]
        new = [ShardState.start(rank, self.world_size, worker, workers) for rank, worker in owners]
        rows = PackedRows(self.config, self.mix, self.tokenizer, self.reader, self.rank, self.world_size)
        rows._starts = {
            worker: shard
            for (rank, worker), shard in zip(owners, reshard(old, new), strict=True)
            if rank == self.rank
        }
        return rows

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """See :attr:`TrainLoader.kinds`."""
        return [(spec.name, task) for spec in self.mix.specs for task in prompts.TASKS]

    def state_dict(self) -> dict[str, Any]:
        return {"shard": self._state or self._start().to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state["shard"]

    def __iter__(self) -> Iterator[tuple[dict[str, Any] | None, Report]]:
        try:
            yield from self._batches()
        except MachineError as error:  # as a value: torch would wrap the exception in a worker's traceback
            yield None, Report(fault=str(error))

    def _batches(self) -> Iterator[tuple[dict[str, Any] | None, Report]]:
        shard = ShardState.from_dict(self._state) if self._state else replace(self._start())
        packer: RowPacker[Document] = RowPacker(
            self.config.seq_length, self.config.open_rows, self.config.patience
        )
        ready = self._restore(shard, packer)
        report = Report()
        while True:
            while len(ready) < self.config.micro_batch_size:
                document = self.read(self.mix.place(shard.take()), report)
                if document is not None:
                    row = packer.add(document, len(document.example))
                    if row is not None:
                        ready.append(row)
                elif len(report.errors) >= _ERRORS_BEFORE_NOTICE:
                    self._remember(shard, packer, ready)
                    yield None, report
                    report = Report()
            rows, ready = ready[: self.config.micro_batch_size], ready[self.config.micro_batch_size :]
            self._remember(shard, packer, ready)
            report.tokens = sum(len(document.example) for row in rows for document in row)
            report.positions = len(rows) * self.config.seq_length
            yield self.collate(rows), report
            report = Report()

    def _start(self) -> ShardState:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if worker in self._starts:
            return ShardState.from_dict(self._starts[worker].to_dict())
        return ShardState.start(self.rank, self.world_size, worker, workers)

    def _remember(self, shard: ShardState, packer: RowPacker[Document], ready: list[list[Document]]) -> None:
        shard.open = [(row.age, _positions(row.documents)) for row in packer.rows]
        shard.ready = [_positions(row) for row in ready]
        self._state = shard.to_dict()

    def _restore(self, shard: ShardState, packer: RowPacker[Document]) -> list[list[Document]]:
        """Read the samples of unfinished rows again; they were counted when they were first read."""
        uncounted = Report()

        def read(positions: list[int]) -> list[Document]:
            documents = (self.read(self.mix.place(position), uncounted) for position in positions)
            return [document for document in documents if document is not None]

        for age, positions in shard.open:
            documents = read(positions)
            packer.rows.append(OpenRow(documents, sum(len(one.example) for one in documents), age))
        return [read(positions) for positions in shard.ready]

    def read(self, place: Place, report: Report) -> Document | None:
        """One document, or None and a reason in the report. A bad sample never ends the run.

        Raises:
            MachineError: a fault of this machine prevented reading the sample.
        """
        spec = self.mix.specs[place.source]
        report.position = max(report.position, place.position)
        try:
            sample = locate(parse_sample(self.mix.raw(place)), self.config.root, spec.path.parent)
            example = build_example(
                sample,
                self.tokenizer,
                self.reader,
                self.config.text_audio_interval_ratio,
                default_system_message=self.config.default_system_message,
            )
            if len(example) > self.config.seq_length:
                raise SampleError(
                    Reason.TOO_LONG, f"{len(example)} tokens, but a row holds {self.config.seq_length}"
                )
        except Exception as error:
            fault = machine_fault(error)
            if fault is not None:
                raise MachineError(
                    f"{spec.path}, row {place.row}: cannot be read because this machine failed: {fault}"
                ) from error
            if isinstance(error, SampleError):
                self._skip(report, place, error.reason, str(error))
            else:  # an unexpected fault of one sample: counted and reported like the others
                logger.debug("sample %s of %s", place.row, spec.path, exc_info=True)
                self._skip(report, place, Reason.INTERNAL.value, first_line(error))
            return None
        finally:
            if self.reader is not None:
                report.speech.update(self.reader.sources)
                self.reader.sources.clear()
        report.used[spec.name] += 1
        report.useful_files.add(str(spec.path))
        kind = place.source * len(prompts.TASKS) + prompts.TASKS.index(prompts.task_of(sample))
        return Document(place.position, example, kind)

    def _skip(self, report: Report, place: Place, reason: str, message: str) -> None:
        spec = self.mix.specs[place.source]
        report.skipped[spec.name, reason] += 1
        report.errors.append(
            {
                "source": spec.name,
                "file": str(spec.path),
                "row": place.row,
                "epoch": place.epoch,
                "reason": reason,
                "message": message,
            }
        )

    def collate(self, rows: list[list[Document]]) -> dict[str, Any]:
        """A batch of rows of documents."""
        examples = [[document.example for document in row] for row in rows]
        kinds = [[document.kind for document in row] for row in rows]
        return collate_rows(examples, self.config.seq_length, self.tokenizer.pad_token_id, kinds)


@dataclass
class Document:
    """A tokenised sample, its position in the mix's stream, and its number in :attr:`TrainLoader.kinds`."""

    position: int
    example: Example
    kind: int


def _positions(documents: list[Document]) -> list[int]:
    return [document.position for document in documents]


def _shards_of(states: Sequence[dict[str, Any]]) -> list[ShardState]:
    """All shard states inside loader states, at any depth of torchdata's own structure."""

    def search(tree: Any) -> Iterator[ShardState]:
        if isinstance(tree, dict):
            if "shard" in tree:
                yield ShardState.from_dict(tree["shard"])
            else:
                for branch in tree.values():
                    yield from search(branch)

    return [shard for state in states for shard in search(state["loader"])]
