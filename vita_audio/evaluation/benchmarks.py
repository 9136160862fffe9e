"""The common parts of all benchmarks: test items, batched replies, and their recognition.

A test set is a file in the training data's format, read by the common sample reader; the final
assistant message is the reference. Items are spread over the processes of a ``torchrun`` launch, answered in batches
of similar length, and gathered again, so every process scores the whole set.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from vita_audio.audio import AudioTokenizer, save_audio
from vita_audio.chat import Conversation, Message, Sample, read_samples
from vita_audio.chat.prompts import from_sample
from vita_audio.distributed import gather_objects, is_first, rank, world_size
from vita_audio.evaluation.transcribers import TranscriberPool
from vita_audio.inference import GenerationOptions, Reply, Request, SpeechPipeline, collect

Entry = TypeVar("Entry")

SPOKEN_REPLY_TOKENS = 1024
"""Maximum length of a reply in all benchmarks with speech output (section 5 of the data specification)."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One test sample.

    Attributes:
        id: names it in result files.
        conversation: the question.
        answer: text of the reference reply.
        answers: accepted answers of a question; just ``answer`` unless the sample lists them.
        reference_audio: the reference reply as speech, if the sample has one.
    """

    id: str
    conversation: Conversation
    answer: str
    answers: tuple[str, ...]
    reference_audio: str | None


@dataclass(frozen=True)
class Utterance:
    """One scored reply, a line of the result files.

    Attributes:
        reference: expected text or answers.
        text: the model's text.
        heard: the transcript of the model's speech; None if there was no speech.
        wav: file of the speech, relative to the result file.
    """

    id: str
    reference: str | list[str]
    text: str
    heard: str | None = None
    wav: str | None = None


Items = list[BenchmarkItem]
AnyPath = str | PathLike[str]


def read_test_set(
    path: AnyPath,
    data_root: AnyPath | None = None,
    limit: int | None = None,
    *,
    answer_lists: bool = False,
    check: Callable[[BenchmarkItem], None] | None = None,
) -> Items:
    """Read a test set in the training data's format.

    Args:
        data_root: base folder of relative audio paths; defaults to ``$ROOT_PATH``, else the file's folder.
        limit: maximum number of items, 1 or more, evenly spread over the file.
        answer_lists: accept a list of answers as the content of the last message.
        check: raises ValueError for an item that cannot be scored.

    Raises:
        ValueError: the file is missing or empty, or a line cannot be used; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such test set")
    root = None if data_root is None else Path(data_root)
    samples = list(read_samples(path, root, answer_lists=answer_lists))
    items: Items = []
    for number, sample in every_nth(samples, limit, path):
        try:
            item = _read_item(sample, number)
            if check is not None:
                check(item)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a test sample: {error}") from error
        items.append(item)
    refuse_repeated_ids(items, path)
    return items


def every_nth(entries: list[Entry], limit: int | None, path: Path) -> list[Entry]:
    """At most ``limit`` entries, evenly spread; None: all.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is None or limit >= len(entries):
        return entries
    if limit < 1:
        raise ValueError(f"a limit of {limit} items leaves none of {path}; give 1 or more")
    return [entries[index * len(entries) // limit] for index in range(limit)]


def refuse_repeated_ids(items: Iterable[BenchmarkItem], path: Path) -> None:
    """
    Raises:
        ValueError: two items have one id.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: id {item.id!r} occurs twice; give each sample its own id")
        seen.add(item.id)


def _read_item(sample: Sample, number: int) -> BenchmarkItem:
    reply = sample.messages[-1]
    if reply.role != "assistant":
        raise ValueError("the last message must be the assistant's, which is the reference")
    conversation = from_sample(sample)
    paths = [audio for audio in sample.audios if isinstance(audio, str)]
    missing = next((path for path in paths if not Path(path).is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing}: no such audio file")
    answer = reply.text.strip()
    recordings = sample.audios[len(sample.audios) - reply.num_audios :]
    return BenchmarkItem(
        id=sample.id or str(number),
        conversation=conversation,
        answer=answer,
        answers=sample.answers or (answer,),
        reference_audio=str(recordings[-1]) if recordings else None,
    )


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
    """

    pipeline: SpeechPipeline
    folder: Path
    name: str
    listener: Listener | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions.greedy)
    batch_size: int = 32
    system: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: give 1 or more")

    def replies(
        self, items: Sequence[BenchmarkItem], limit: Callable[[int], int] | None = None
    ) -> Iterator[tuple[BenchmarkItem, Reply]]:
        """Replies of this process's share of the items, as codes, batch by batch.

        Prompts of similar length share a batch, which keeps padding small. Each item has its own seed.

        Args:
            limit: maps a batch's longest prompt to the maximum length of its replies, in tokens.
        """
        mine = list(items[rank() :: world_size()])
        prompts = {
            item.id: self.pipeline.prompt(with_system(item.conversation, self.system)) for item in mine
        }
        seeds = {item.id: self._seed(index) for index, item in enumerate(items)}
        mine.sort(key=lambda item: len(prompts[item.id]))
        # One progress bar, only in a terminal: logs get the rows instead.
        progress = tqdm(
            total=len(mine), desc=self.name, unit="reply", leave=False, disable=None if is_first() else True
        )
        for start in range(0, len(mine), self.batch_size):
            batch = mine[start : start + self.batch_size]
            options = self.options
            if limit is not None:
                longest = max(len(prompts[item.id]) for item in batch)
                options = replace(options, max_new_tokens=min(options.max_new_tokens, limit(longest)))
            requests = [
                Request(prompts[item.id], replace(options, seed=seeds[item.id]), sound="none")
                for item in batch
            ]
            events = self.pipeline.backend.stream_many(requests)
            yield from zip(batch, collect(events, len(requests)), strict=True)
            progress.update(len(batch))
        progress.close()

    def spoken(
        self, items: Sequence[BenchmarkItem], reference: Callable[[BenchmarkItem], str | list[str]]
    ) -> list[Utterance]:
        """Generate the replies, write and recognise their speech, and gather the results."""
        started: list[tuple[BenchmarkItem, Reply, Path | None, Future[str] | None]] = []
        for item, reply in self.replies(items):
            wav = self.wav(item.id) if reply.codes else None
            started.append((item, reply, wav, None if wav is None else self.hear(reply.codes, wav)))
        return gather(
            [
                Utterance(
                    id=item.id,
                    reference=reference(item),
                    text=reply.text,
                    heard=None if heard is None else heard.result(),
                    wav=None if wav is None else wav.as_posix(),
                )
                for item, reply, wav, heard in started
            ]
        )

    def hear(self, codes: Sequence[int], wav: Path) -> Future[str]:
        """Write speech to ``folder/wav`` and start recognising it."""
        assert self.listener is not None, "a task with speech output needs a listener"
        return self.listener.hear(codes, self.folder / wav)

    def wav(self, identifier: str) -> Path:
        """Path of an item's speech, relative to the folder."""
        return Path("wav") / self.name / f"{file_name(identifier)}.wav"

    def _seed(self, index: int) -> int | None:
        return None if self.options.seed is None else self.options.seed + index


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with ``system`` as its system message, unless it has one or ``system`` is None."""
    if not system or any(message.role == "system" for message in conversation.messages):
        return conversation
    return Conversation((Message("system", (system,)), *conversation.messages), conversation.audios)


class Listener:
    """Turns codes into WAV files and recognises them, in parallel with the caller.

    Identical codes are decoded and recognised once: codec and recognisers are deterministic, and stages that
    share a frozen language model give identical replies.
    """

    def __init__(self, codec: AudioTokenizer, pool: TranscriberPool):
        self._codec = codec
        self._pool = pool
        self._written: dict[str, Path] = {}
        self._heard: dict[str, Future[str]] = {}

    def hear(self, codes: Sequence[int], wav: Path) -> Future[str]:
        """Write the speech to ``wav`` and start recognising it."""
        key = hashlib.sha256(json.dumps(list(codes)).encode()).hexdigest()
        wav.parent.mkdir(parents=True, exist_ok=True)
        if key not in self._written:
            save_audio(wav, self._codec.decode(codes), self._codec.sample_rate)
            self._written[key] = wav
            self._heard[key] = self._pool.submit(str(wav))
        elif self._written[key] != wav:
            shutil.copyfile(self._written[key], wav)
        return self._heard[key]

    def hear_file(self, audio: str) -> Future[str]:
        """Start recognising a recording."""
        return self._pool.submit(audio)


def gather(mine: list[Utterance]) -> list[Utterance]:
    """The utterances of all processes, on every process, ordered by id."""
    shares = gather_objects(mine)
    return sorted((utterance for share in shares for utterance in share), key=lambda utterance: utterance.id)


def file_name(identifier: str) -> str:
    """A file name, without suffix, that is unique to an id on every file system.

    Short ids of lower-case letters, digits, "_" and "." are used unchanged. Others keep their readable
    characters, and a digest of the whole id makes them unique.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_.]{0,63}", identifier):
        return identifier
    readable = re.sub(r"[^a-z0-9_.]+", "_", identifier.lower())[:40].strip("._")
    digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable}-{digest}" if readable else f"id-{digest}"
