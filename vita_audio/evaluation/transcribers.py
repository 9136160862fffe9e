"""Independent recognisers that transcribe the model's speech, opened by name.

* ``pocketsphinx``: small, runs on the CPU, with its acoustic model in its pip package. It is weak on open
  speech, but reliable on a small domain when restricted to a grammar (a JSGF file).
* ``whisper``: Whisper-large-v3 (or any folder of that architecture) through transformers; used for the
  published speech-QA and English TTS figures. ``faster-whisper`` runs it through CTranslate2.
* ``paraformer``: Paraformer-zh through FunASR; used for the published Mandarin TTS figures.
* ``sensevoice``: SenseVoiceSmall's encoder and CTC layer, without FunASR.
* ``command:…``: any program that prints the transcript of ``{wav}``.

:mod:`~vita_audio.evaluation.recognisers` implements them; :class:`TranscriberPool` runs one of them over WAV files, in
several processes or in batches.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import try_to_load_from_cache

from vita_audio.audio import AudioLike, load_audio
from vita_audio.files import content_fingerprint

logger = logging.getLogger(__name__)

RECOGNISER_RATE = 16_000
"""All three recognisers were trained on 16 kHz speech."""


class RecogniserError(ValueError):
    """A recogniser that cannot be opened, which fails all clips alike."""


Waveform = tuple[torch.Tensor, int]
"""Samples of shape (samples,) and their rate in Hz."""


class Transcriber(ABC):
    """Speech to text.

    Attributes:
        batch_size: how many clips are best transcribed together.
    """

    batch_size = 1

    def transcribe(self, waveform: torch.Tensor, rate: int) -> str:
        """Words spoken in a waveform of shape (samples,); deterministic."""
        return self.transcribe_batch([(waveform, rate)])[0]

    @abstractmethod
    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        """Words of each clip."""


@dataclass(frozen=True)
class TranscriberConfig:
    """Which recogniser to open, and how. Small and picklable, so each process can open its own.

    Attributes:
        name: ``pocketsphinx``, ``whisper``, ``faster-whisper``, ``paraformer``, ``sensevoice`` or
            ``command:PROGRAM {wav}``, which prints the transcript.
        path: weights of the neural recognisers: a folder, or a name on the hub that is in the local cache;
            defaults to the published ones.
        grammar: JSGF file that restricts pocketsphinx; None: its own language model.
        language: spoken language, such as ``en`` or ``zh``.
        device: device of the neural recognisers.
    """

    name: str = "pocketsphinx"
    path: str | None = None
    grammar: str | None = None
    language: str | None = None
    device: str = "cpu"

    def check(self) -> None:
        """Check quickly, and without network, whether :meth:`open` can work.

        Raises:
            ValueError: the name is unknown, weights or a file are missing, or a package is not installed.
        """
        if self.name == "pocketsphinx" or self.name.startswith(COMMAND):
            self.open()  # takes a third of a second at most
        elif self.name == "whisper":
            _find_weights(self.path or WHISPER)
        elif self.name in _PACKAGES:
            if find_spec(_PACKAGES[self.name]) is None:
                raise ValueError(f"the {self.name} transcriber needs {_INSTALL[self.name]}")
            # faster-whisper also takes names of its sizes.
            if self.name == "paraformer" and self.path is not None and not Path(self.path).is_dir():
                raise ValueError(f"{self.path}: no such folder; give one with Paraformer's weights")
        elif self.name == "sensevoice":
            if not (Path(self.path or SENSEVOICE) / "am.mvn").is_file():
                raise ValueError(
                    f"{self.path or SENSEVOICE}: not a folder with SenseVoice's weights and am.mvn; download it with "
                    f"'hf download FunAudioLLM/SenseVoiceSmall --local-dir {SENSEVOICE}'"
                )
        else:
            raise ValueError(
                f"unknown transcriber {self.name!r}; known: {', '.join(RECOGNISERS)}, {COMMAND}…"
            )

    def open(self) -> Transcriber:
        """The recogniser.

        Raises:
            ValueError: see :meth:`check`.
        """
        from vita_audio.evaluation import recognisers

        if self.name == "pocketsphinx":
            return recognisers.PocketSphinxTranscriber(self.grammar)
        if self.name.startswith(COMMAND):
            return recognisers.CommandTranscriber(self.name.removeprefix(COMMAND))
        self.check()
        if self.name == "whisper":
            model = str(_find_weights(self.path or WHISPER))
            return recognisers.WhisperTranscriber(model, self.language, self.device)
        if self.name == "faster-whisper":
            return recognisers.FasterWhisperTranscriber(
                self.path or FASTER_WHISPER, self.language, self.device
            )
        if self.name == "sensevoice":
            return recognisers.SenseVoiceTranscriber(self.path or SENSEVOICE, self.language, self.device)
        return recognisers.ParaformerTranscriber(self.path or PARAFORMER, self.device)

    def fingerprint(self) -> str:
        """A digest of everything that can change a transcript: the recogniser, its weights and its grammar."""
        if self.name == "pocketsphinx":
            content = [version("pocketsphinx"), _SETTINGS]
            if self.grammar is not None:
                content.append(Path(self.grammar).read_text(encoding="utf-8"))
            return repr([self.name, *content])
        if self.name.startswith(COMMAND):
            return self.name
        path = _find_weights(self.path or WHISPER) if self.name == "whisper" else Path(self._weights)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return repr([self.name, self.language, content_fingerprint(files) if files else str(path)])

    def describe(self) -> str:
        """A description for readers of scores."""
        if self.name == "pocketsphinx":
            if self.grammar is None:
                return "pocketsphinx without a grammar, which mishears much of open speech"
            return f"pocketsphinx, restricted to {Path(self.grammar).name}"
        if self.name.startswith(COMMAND):
            return self.name
        return f"{self.name}, {self._weights}"

    @property
    def _weights(self) -> str:
        return self.path or _PUBLISHED[self.name]


RECOGNISERS = ("pocketsphinx", "whisper", "faster-whisper", "paraformer", "sensevoice")
COMMAND = "command:"
WHISPER = "openai/whisper-large-v3"
FASTER_WHISPER = "large-v3"
PARAFORMER = "paraformer-zh"
SENSEVOICE = "models/FunAudioLLM/SenseVoiceSmall"
_PUBLISHED = {
    "whisper": WHISPER,
    "faster-whisper": FASTER_WHISPER,
    "paraformer": PARAFORMER,
    "sensevoice": SENSEVOICE,
}
_PACKAGES = {"faster-whisper": "faster_whisper", "paraformer": "funasr"}
_INSTALL = {
    "faster-whisper": "its package; pip install faster-whisper",
    "paraformer": "FunASR; pip install funasr==1.4.16",
}
_SETTINGS = "every clip afresh"
"""Changed whenever recognisers process clips differently, so older scores are not reused."""


def _find_weights(model: str) -> Path:
    """The folder of a model that is given as a folder or as the hub name of a cached model."""
    if (Path(model) / "config.json").is_file():
        return _with_weights(Path(model))
    # A name on the hub has two parts; others the hub library refuses to look up.
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model, re.ASCII) is not None
    try:
        cached = try_to_load_from_cache(model, "config.json") if is_name else None
    except ValueError:  # a name that the hub cannot have
        cached = None
    if not isinstance(cached, str):
        raise ValueError(
            f"{model}: not a folder with Whisper's config.json, and not in the local cache; download it with "
            f"'hf download {WHISPER}' or give --transcriber_path a folder"
        )
    return _with_weights(Path(cached).parent)


def _with_weights(folder: Path) -> Path:
    if not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise ValueError(f"{folder}: holds Whisper's config.json but no weights; copy the complete folder")
    return folder


class TranscriberPool:
    """One recogniser in each of several processes; a context manager.

    Clips are submitted as they become available, so recognition runs in parallel with generation and decoding. In this
    process, clips wait until they fill a batch of the recogniser, or until one of them is needed.

    Args:
        config: the recogniser.
        processes: number of processes; 0 recognises in this process, synchronously (for recognisers on a GPU).
    """

    def __init__(self, config: TranscriberConfig, processes: int = 2):
        if processes < 0:
            raise ValueError(f"{processes} recogniser processes: give 0 or more")
        self._in_process = _Batches(config.open()) if processes == 0 else None
        self._executor = _start_workers(config, processes) if processes else None

    def __enter__(self) -> TranscriberPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def submit(self, audio: AudioLike) -> Future[str]:
        """Start recognising one clip."""
        if self._executor:
            return self._executor.submit(_transcribe_in_worker, audio)
        assert self._in_process is not None
        return self._in_process.submit(audio)

    def transcribe(self, audios: Iterable[AudioLike]) -> Iterator[str]:
        """Words of each clip, in order."""
        futures = [self.submit(audio) for audio in audios]
        return (future.result() for future in futures)


class _Batches:
    """Transcribes clips in batches, synchronously."""

    def __init__(self, transcriber: Transcriber):
        self._transcriber = transcriber
        self._waiting: list[tuple[AudioLike, _Awaited]] = []

    def submit(self, audio: AudioLike) -> Future[str]:
        result = _Awaited(self.flush)
        self._waiting.append((audio, result))
        if len(self._waiting) >= self._transcriber.batch_size:
            self.flush()
        return result

    def flush(self) -> None:
        """Transcribe what waits. If a batch fails, each of its clips is tried alone."""
        waiting, self._waiting = self._waiting, []
        try:
            texts = self._transcriber.transcribe_batch([load_audio(audio) for audio, _ in waiting])
        except (RuntimeError, ValueError, OSError) as problem:
            if len(waiting) > 1:
                logger.warning("a batch of %d clips is recognised one by one: %s", len(waiting), problem)
            for audio, result in waiting:
                try:
                    result.set_result(_transcribe(self._transcriber, audio))
                except (RuntimeError, ValueError, OSError) as error:
                    result.set_exception(error)
            return
        for (_, result), text in zip(waiting, texts, strict=True):
            result.set_result(text)


class _Awaited(Future[str]):
    """A transcript that is made at the latest when it is asked for."""

    def __init__(self, flush: Callable[[], None]):
        super().__init__()
        self._flush = flush

    def result(self, timeout: float | None = None) -> str:
        if not self.done():
            self._flush()
        return super().result(timeout)


def _start_workers(config: TranscriberConfig, processes: int) -> ProcessPoolExecutor:
    # The fork server imports once for all workers, and has neither CUDA nor this process's threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "vita_audio.evaluation.recognisers"])
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_open_in_worker, initargs=(config,))


_worker_transcriber: Transcriber | RecogniserError
"""A worker's recogniser, or the error that prevented it from opening."""


def _open_in_worker(config: TranscriberConfig) -> None:
    global _worker_transcriber
    torch.set_num_threads(1)
    try:
        _worker_transcriber = config.open()
    except ValueError as error:  # raised at the first clip: an initialiser's own error is lost
        _worker_transcriber = RecogniserError(str(error))


def _transcribe_in_worker(audio: AudioLike) -> str:
    if isinstance(_worker_transcriber, RecogniserError):
        raise _worker_transcriber
    return _transcribe(_worker_transcriber, audio)


def _transcribe(transcriber: Transcriber, audio: AudioLike) -> str:
    return transcriber.transcribe(*load_audio(audio))
