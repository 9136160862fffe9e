"""What the ASR, TTS and speech-QA benchmarks share: test items, batched replies, hearing them.

A test set is a file in the training data's format (one sample per line); its last assistant
message is the reference. Items are spread over the processes of a ``torchrun`` launch, answered
in batches of similar length, and gathered again, so that every process scores the whole set.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

from tqdm import tqdm

from vita_audio import distributed
from vita_audio.audio import AudioTokenizer, save_audio
from vita_audio.chat import Sample, read_samples
from vita_audio.chat.prompts import from_sample
from vita_audio.evaluation.transcribers import TranscriberPool
from vita_audio.files import write_json_lines
from vita_audio.inference import Conversation, GenerationOptions, Reply, Request, SpeechPipeline, collect

SPOKEN_REPLY_TOKENS = 1024
"""Longest reply of the TTS and speech-QA benchmarks (section 5 of the data specification)."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One test sample.

    Attributes:
        id: names it in result files.
        conversation: what is asked.
        answer: text of the reference reply.
        answers: accepted answers of a question; just ``answer`` unless the sample lists them.
        reference_audio: the reference reply as speech, where the sample has one.
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
        text: what the model wrote.
        heard: what the recogniser heard in its speech; None when there was no speech.
        wav: file of the speech, relative to the result file.
    """

    id: str
    reference: str | list[str]
    text: str
    heard: str | None = None
    wav: str | None = None


def read_test_set(
    path: str | PathLike[str],
    data_root: str | PathLike[str] | None = None,
    limit: int | None = None,
    default_system: str | None = None,
) -> list[BenchmarkItem]:
    """Read a JSON-lines test set.

    Args:
        data_root: folder that relative audio paths start from; the file's own when absent.
        limit: at most so many items, 1 or more, evenly spread over the file.
        default_system: system message for samples that have none.

    Raises:
        ValueError: the file is missing or empty, or a line cannot be used; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such test set")
    samples = list(read_samples(path, data_root, answer_lists=True))
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} items leaves nothing of {path}; give 1 or more")
    if limit is not None and limit < len(samples):
        samples = [samples[index * len(samples) // limit] for index in range(limit)]
    items: list[BenchmarkItem] = []
    seen: set[str] = set()
    for number, sample in samples:
        try:
            items.append(_read_item(sample, number, default_system))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a test sample: {error}") from error
        if items[-1].id in seen:
            raise ValueError(f"{path}:{number}: id {items[-1].id!r} occurs twice")
        seen.add(items[-1].id)
    return items


def _read_item(sample: Sample, number: int, default_system: str | None) -> BenchmarkItem:
    reply = sample.messages[-1]
    if reply.role != "assistant":
        raise ValueError("the last message must be the assistant's, which is the reference")
    conversation = from_sample(sample, default_system)
    answer = reply.text.strip()
    recordings = sample.audios[len(sample.audios) - reply.num_audios :]
    return BenchmarkItem(
        id=sample.id or str(number),
        conversation=conversation,
        answer=answer,
        answers=sample.answers or (answer,),
        reference_audio=str(recordings[-1]) if recordings else None,
    )


def batched_replies(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    options: GenerationOptions | Callable[[int], GenerationOptions],
    batch_size: int,
    label: str,
) -> Iterator[tuple[BenchmarkItem, Reply]]:
    """Replies of this process's share of the items, as codes, batch by batch.

    Prompts of similar length share a batch, which keeps padding small.

    Args:
        options: the options, or a function of a batch's longest prompt that gives them.
    """
    mine = list(items[distributed.rank() :: distributed.world_size()])
    prompts = {item.id: pipeline.prompt(item.conversation) for item in mine}
    mine.sort(key=lambda item: len(prompts[item.id]))
    # One bar, in a terminal only: logs get the rows instead.
    progress = tqdm(
        total=len(mine),
        desc=label,
        unit="reply",
        leave=False,
        disable=None if distributed.is_first() else True,
    )
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        batch_prompts = [prompts[item.id] for item in batch]
        batch_options = options(max(map(len, batch_prompts))) if callable(options) else options
        requests = [Request(prompt, batch_options, sound="none") for prompt in batch_prompts]
        yield from zip(batch, collect(pipeline.backend.stream_many(requests), len(requests)), strict=True)
        progress.update(len(batch))
    progress.close()


class Listener:
    """Turns codes into WAV files and has them recognised, in parallel with the caller.

    The same codes are decoded and recognised once: codec and recognisers are deterministic, and
    stages that share a frozen language model say the same.
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
        if key in self._written:
            shutil.copyfile(self._written[key], wav)
        else:
            save_audio(wav, self._codec.decode(codes), self._codec.sample_rate)
            self._written[key] = wav
            self._heard[key] = self._pool.submit(str(wav))
        return self._heard[key]

    def hear_file(self, audio: str) -> Future[str]:
        """Start recognising a recording."""
        return self._pool.submit(audio)


def spoken_utterances(
    replies: Iterable[tuple[BenchmarkItem, Reply]],
    listener: Listener,
    folder: Path,
    task: str,
    reference: Callable[[BenchmarkItem], str | list[str]],
) -> list[Utterance]:
    """Write, recognise and gather spoken replies; WAV files lie in ``folder/wav/task``."""
    started = []
    for item, reply in replies:
        wav = Path("wav") / task / wav_name(item.id) if reply.codes else None
        started.append((item, reply, wav, listener.hear(reply.codes, folder / wav) if wav else None))
    return gather(
        [
            Utterance(item.id, reference(item), reply.text, heard and heard.result(), wav and wav.as_posix())
            for item, reply, wav, heard in started
        ]
    )


def write_utterances(path: Path, utterances: Iterable[Utterance]) -> None:
    """One JSON object per line; only the first process writes."""
    if distributed.is_first():
        write_json_lines(path, map(asdict, utterances))


def gather(mine: list[Utterance]) -> list[Utterance]:
    """Every process's utterances, in every process, in order of id."""
    everybodys = (utterance for share in distributed.gather_objects(mine) for utterance in share)
    return sorted(everybodys, key=lambda utterance: utterance.id)


def wav_name(identifier: str) -> str:
    """File name for an utterance's speech."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in identifier) + ".wav"
