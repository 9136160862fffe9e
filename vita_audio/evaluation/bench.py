"""Answers the items of a test set: batched, on any number of processes, and resumed after a kill.

Items are dealt in batches of similar length to whichever process is free (``torchrun`` starts them). An utterance is
written when it is finished (:mod:`~vita_audio.evaluation.journal`). An item that fails, because its audio is
damaged or memory ran out, does not end the run: it is named, counted and not scored.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from vita_audio.audio.io import audio_duration
from vita_audio.chat import Conversation, Example, Message
from vita_audio.chat.reply import split_reply
from vita_audio.distributed import gather_objects, is_first, shared_numbers, world_size
from vita_audio.evaluation.items import BenchmarkItem, file_name
from vita_audio.evaluation.journal import Journal, Utterance
from vita_audio.evaluation.listening import Listener
from vita_audio.evaluation.quality import Dnsmos
from vita_audio.evaluation.similarity import SpeakerEncoder
from vita_audio.evaluation.transcribers import RecogniserError
from vita_audio.inference import GenerationOptions, Reply, Request, SpeechPipeline, collect

logger = logging.getLogger(__name__)

SPOKEN_REPLY_TOKENS = 1024
"""Maximum length of a reply in all benchmarks with speech output (section 5 of the data specification)."""
FAILURES = (RuntimeError, ValueError, OSError, ArithmeticError)
"""Errors of one item: damaged audio, memory, the disk. Others are faults of the program and end it."""
_PROMPT_TOKENS_PER_SECOND = 12.5  # of speech codes; only used to order items

Reference = Callable[[BenchmarkItem], str | list[str]]


@dataclass(frozen=True)
class Started:
    """An utterance whose speech may still be in recognition, or the error that prevented it."""

    utterance: Utterance | None
    heard: Future[str] | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.heard is None or self.heard.done()

    def result(self) -> Utterance:
        """The complete utterance; waits for the recogniser.

        Raises:
            Exception: the item failed.
        """
        if self.utterance is None:
            raise self.error or RuntimeError("no utterance")
        return self.utterance if self.heard is None else replace(self.utterance, heard=self.heard.result())


@dataclass(frozen=True)
class Bench:
    """The setup in which the items of a test set are answered.

    Attributes:
        pipeline: the model.
        folder: folder of the result files; WAV files go to ``folder/wav/name``.
        name: name of the test set.
        listener: recognises the model's speech; None if no task needs it.
        options: how replies are generated.
        batch_size: replies generated together.
        system: system message for conversations that have none; None for none.
        speaker: compares voices; None: similarity is not measured.
        quality: predicts how natural speech sounds; None: not measured.
        fingerprint: of everything that affects the utterances; None: a killed run starts from the beginning.
    """

    pipeline: SpeechPipeline
    folder: Path
    name: str
    listener: Listener | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions.greedy)
    batch_size: int = 32
    system: str | None = None
    speaker: SpeakerEncoder | None = None
    quality: Dnsmos | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: give 1 or more")

    def written(
        self,
        items: Sequence[BenchmarkItem],
        reference: Reference,
        limit: Callable[[int], int],
    ) -> list[Utterance]:
        """The model's text for every item, on every process, ordered by id.

        Args:
            limit: maps the length of a prompt to the maximum length of its reply, in tokens.
        """

        def finish(item: BenchmarkItem, reply: Reply) -> Started:
            return Started(Utterance(item.id, reference(item), reply.text))

        return self._answered(items, reference, finish, limit)

    def spoken(self, items: Sequence[BenchmarkItem], reference: Reference) -> list[Utterance]:
        """The model's text and speech for every item, and what is heard in it, ordered by id."""

        def finish(item: BenchmarkItem, reply: Reply) -> Started:
            utterance = Utterance(item.id, reference(item), reply.text)
            if not reply.codes:
                return Started(utterance)
            wav = self.wav(item.id)
            heard = self.hear(reply.codes, wav)
            utterance = replace(
                utterance,
                wav=wav.as_posix(),
                similarity=self._similarity(item, wav),
                quality=None if self.quality is None else self.quality.score(self.folder / wav),
            )
            return Started(utterance, heard)

        return self._answered(items, reference, finish)

    def recorded(
        self,
        kind: str,
        items: Sequence[BenchmarkItem],
        reference: Callable[[BenchmarkItem], str],
        finish: Callable[[BenchmarkItem], Started],
    ) -> list[Utterance]:
        """Utterances that do not come from the model but from a recording of each item.

        Args:
            kind: tells them from other utterances of the same items.
        """
        return self._finished(
            f"{self.name}_{kind}",
            items,
            reference,
            lambda batch: [_guarded(partial(finish, item)) for item in batch],
        )

    def hear(self, codes: Sequence[int], wav: Path) -> Future[str]:
        """Write speech to ``folder/wav`` and start recognising it."""
        assert self.listener is not None, "a task with speech output needs a listener"
        return self.listener.hear(codes, self.folder / wav)

    def wav(self, identifier: str) -> Path:
        """Path of an item's speech, relative to the folder."""
        return Path("wav") / self.name / f"{file_name(identifier)}.wav"

    def _similarity(self, item: BenchmarkItem, wav: Path) -> float | None:
        if self.speaker is None or item.voice is None:
            return None
        return self.speaker.similarity(self.folder / wav, item.voice)

    def _answered(
        self,
        items: Sequence[BenchmarkItem],
        reference: Reference,
        finish: Callable[[BenchmarkItem, Reply], Started],
        limit: Callable[[int], int] | None = None,
    ) -> list[Utterance]:
        seeds = {item.id: self._seed(index) for index, item in enumerate(items)}

        def start(batch: Sequence[BenchmarkItem]) -> list[Started]:
            prompts: dict[str, Example] = {}
            started: dict[str, Started] = {}
            for item in batch:
                try:
                    prompts[item.id] = self.pipeline.prompt(with_system(item.conversation, self.system))
                except FAILURES as error:
                    started[item.id] = Started(None, error=error)
            ready = [item for item in batch if item.id in prompts]
            for item, reply in self._replies(ready, prompts, seeds, limit):
                if isinstance(reply, Exception):
                    started[item.id] = Started(None, error=reply)
                else:
                    started[item.id] = _guarded(partial(finish, item, reply))
            return [started[item.id] for item in batch]

        return self._finished(self.name, items, reference, start)

    def _replies(
        self,
        batch: Sequence[BenchmarkItem],
        prompts: dict[str, Example],
        seeds: dict[str, int | None],
        limit: Callable[[int], int] | None,
    ) -> list[tuple[BenchmarkItem, Reply | Exception]]:
        """The replies of a batch; if it fails, each item is tried alone."""
        if not batch:
            return []
        limits = {
            item.id: min(self.options.max_new_tokens, limit(len(prompts[item.id])))
            if limit is not None
            else self.options.max_new_tokens
            for item in batch
        }
        options = replace(self.options, max_new_tokens=max(limits.values()))
        requests = [
            Request(prompts[item.id], replace(options, seed=seeds[item.id]), sound="none") for item in batch
        ]
        try:
            replies = collect(self.pipeline.backend.stream_many(requests), len(requests))
        except FAILURES as error:
            if len(batch) == 1:
                return [(batch[0], error)]
            return [pair for item in batch for pair in self._replies([item], prompts, seeds, limit)]
        return [
            (item, self._shortened(reply, limits[item.id]))
            for item, reply in zip(batch, replies, strict=True)
        ]

    def _shortened(self, reply: Reply, limit: int) -> Reply:
        """The reply that its own limit would have given: a batch runs to the highest of its limits."""
        if len(reply.token_ids) <= limit:
            return reply
        ids = reply.token_ids[:limit]
        text, codes = split_reply(ids, self.pipeline.tokenizer)
        return replace(reply, text=text, codes=codes, token_ids=ids)

    def _finished(
        self,
        name: str,
        items: Sequence[BenchmarkItem],
        reference: Reference,
        start: Callable[[Sequence[BenchmarkItem]], list[Started]],
    ) -> list[Utterance]:
        """Deal the items, finish the utterances of this process, and gather those of all."""
        mine: list[Utterance] = []
        waiting: deque[tuple[BenchmarkItem, Started]] = deque()
        with Journal(self.folder, name, self.fingerprint) as journal:

            def finish(most: int) -> None:
                """Finish what is heard, and wait until at most so many are not."""
                while waiting and (len(waiting) > most or waiting[0][1].is_done):
                    item, started = waiting.popleft()
                    mine.append(_finish(item, reference, started))
                    journal.add(mine[-1])

            left = [item for item in items if item.id not in journal.finished]
            for batch in self._dealt(name, left):
                waiting.extend(zip(batch, start(batch), strict=True))
                finish(most=self.batch_size)  # recognition runs beside the next batch
            finish(most=0)
        kept = [journal.finished[item.id] for item in items if item.id in journal.finished]
        gathered = [utterance for share in gather_objects(mine) for utterance in share]
        return sorted([*kept, *gathered], key=lambda utterance: utterance.id)

    def _dealt(self, name: str, items: Sequence[BenchmarkItem]) -> Iterator[list[BenchmarkItem]]:
        """This process's batches, the longest items first."""
        ordered = sorted(items, key=_prompt_length, reverse=True)
        batches = list(_batches(ordered, self.batch_size, world_size()))
        progress = tqdm(
            total=len(batches), desc=name, unit="batch", leave=False, disable=None if is_first() else True
        )
        for number in shared_numbers(f"{self.folder}/{name}"):
            if number >= len(batches):
                break
            yield batches[number]
            progress.update(number + 1 - progress.n)
        progress.close()

    def _seed(self, index: int) -> int | None:
        return None if self.options.seed is None else self.options.seed + index


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with ``system`` as its system message, unless it has one or ``system`` is None."""
    if not system or any(message.role == "system" for message in conversation.messages):
        return conversation
    return Conversation((Message("system", (system,)), *conversation.messages), conversation.audios)


def _prompt_length(item: BenchmarkItem) -> float:
    """About how many tokens the prompt has; the codec's work is not needed to know it."""
    seconds = 0.0
    for audio in item.conversation.audios:
        try:
            seconds += audio_duration(audio)
        except FAILURES:  # the item will fail, and be named, when it is asked
            continue
    letters = sum(len(message.text) for message in item.conversation.messages)
    return _PROMPT_TOKENS_PER_SECOND * seconds + letters / 4


def _batches(items: Sequence[BenchmarkItem], size: int, processes: int) -> Iterator[list[BenchmarkItem]]:
    """Batches in order. With several processes the last ones are smaller, so all end at about the same time."""
    start = 0
    while start < len(items):
        fair = size if processes == 1 else -(-(len(items) - start) // (2 * processes))
        count = max(1, min(size, fair))
        yield list(items[start : start + count])
        start += count


def _guarded(begin: Callable[[], Started]) -> Started:
    try:
        return begin()
    except (RecogniserError, BrokenExecutor):
        raise
    except FAILURES as error:
        return Started(None, error=error)


def _finish(
    item: BenchmarkItem,
    reference: Reference,
    started: Started,
) -> Utterance:
    try:
        return started.result()
    except (RecogniserError, BrokenExecutor):
        raise
    except FAILURES as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.error("%s: %s", item.id, message)
        return Utterance(item.id, reference(item), "", failure=message)
