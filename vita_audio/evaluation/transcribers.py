"""Independent recognisers that transcribe the model's speech.

* ``pocketsphinx``: small, runs on the CPU, with its acoustic model in its pip package. It is weak on open
  speech, but reliable on a small domain when restricted to a grammar (a JSGF file).
* ``whisper``: Whisper-large-v3 (or any folder of that architecture) through transformers; used for the
  published speech-QA and English TTS figures.
* ``paraformer``: Paraformer-zh through FunASR; used for the published Mandarin TTS figures.

All share ``transcribe(waveform, rate) -> str``; :class:`TranscriberPool` runs one of them over
WAV files in several processes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from vita_audio.audio import AudioLike, load_audio
from vita_audio.files import content_fingerprint

RECOGNISER_RATE = 16_000
"""All three recognisers were trained on 16 kHz speech."""


class RecogniserError(ValueError):
    """A recogniser that cannot be opened, which fails all clips alike."""


class Transcriber(ABC):
    """Speech to text."""

    @abstractmethod
    def transcribe(self, waveform: torch.Tensor, rate: int) -> str:
        """Words spoken in a waveform of shape (samples,); deterministic."""


@dataclass(frozen=True)
class TranscriberConfig:
    """Which recogniser to open, and how. Small and picklable, so each process can open its own.

    Attributes:
        name: ``pocketsphinx``, ``whisper`` or ``paraformer``.
        path: weights of the neural recognisers: a folder, or a name on the hub that is in the local cache;
            defaults to the published ones.
        grammar: JSGF file that restricts pocketsphinx; None: its own language model.
        language: spoken language, such as ``en`` or ``zh``; whisper only.
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
        if self.name == "pocketsphinx":
            self.open()  # takes a third of a second
        elif self.name == "whisper":
            _find_weights(self.path or WHISPER)
        elif self.name == "paraformer":
            if find_spec("funasr") is None:
                raise ValueError("the paraformer transcriber needs FunASR; pip install funasr")
            if self.path is not None and not Path(self.path).is_dir():
                raise ValueError(f"{self.path}: no such folder; give one with Paraformer's weights")
        else:
            raise ValueError(f"unknown transcriber {self.name!r}; known: {', '.join(RECOGNISERS)}")

    def open(self) -> Transcriber:
        """The recogniser.

        Raises:
            ValueError: see :meth:`check`.
        """
        if self.name == "pocketsphinx":
            return PocketSphinxTranscriber(self.grammar)
        self.check()
        if self.name == "whisper":
            return WhisperTranscriber(str(_find_weights(self.path or WHISPER)), self.language, self.device)
        return ParaformerTranscriber(self.path or PARAFORMER, self.device)

    def fingerprint(self) -> str:
        """A digest of everything that can change a transcript: the recogniser, its weights and its grammar."""
        if self.name == "pocketsphinx":
            content = [version("pocketsphinx"), _SETTINGS]
            if self.grammar is not None:
                content.append(Path(self.grammar).read_text(encoding="utf-8"))
            return repr([self.name, *content])
        path = (
            _find_weights(self.path or WHISPER) if self.name == "whisper" else Path(self.path or PARAFORMER)
        )
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return repr([self.name, self.language, content_fingerprint(files) if files else str(path)])

    def describe(self) -> str:
        """A description for readers of scores."""
        if self.name == "pocketsphinx":
            if self.grammar is None:
                return "pocketsphinx without a grammar, which mishears much of open speech"
            return f"pocketsphinx, restricted to {Path(self.grammar).name}"
        return f"{self.name}, {self.path or (WHISPER if self.name == 'whisper' else PARAFORMER)}"


RECOGNISERS = ("pocketsphinx", "whisper", "paraformer")
WHISPER = "openai/whisper-large-v3"
PARAFORMER = "paraformer-zh"


def _find_weights(model: str) -> Path:
    """The folder of a model that is given as a folder or as the hub name of a cached model."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
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
    return Path(cached).parent


class PocketSphinxTranscriber(Transcriber):
    """CMU Sphinx with its US English acoustic model.

    Its noise models mistake short pauses for breaths, and its words match digital silence: unmodified,
    it inserts about 20% extra words in clean synthetic digits. Every clip is therefore normalised in loudness,
    padded with silence and mixed with faint fixed noise, and with a grammar, pauses may only be
    silence. This reduces the 20% to about 2%.

    Its acoustic model uses noise removal, whose noise estimate is part of the feature extraction and
    persists across clips. That part is rebuilt for every clip (about a millisecond), so a transcript
    does not depend on earlier clips.

    Args:
        grammar: JSGF file with one public rule; every word must be in CMU's dictionary.
    """

    def __init__(self, grammar: str | PathLike[str] | None = None):
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise ValueError(
                "pocketsphinx is not installed; run pip install -e '.[eval]' in the repository"
            ) from error
        generator = torch.Generator().manual_seed(0)
        self._noise = _NOISE_LEVEL * torch.randn(RECOGNISER_RATE, generator=generator)
        # "batch": cepstral means over the whole clip.
        settings = {"samprate": float(RECOGNISER_RATE), "cmn": "batch", "loglevel": "FATAL"}
        if grammar is None:
            self._decoder = Decoder(**settings)
            return
        if not Path(grammar).is_file():
            raise ValueError(f"{grammar}: no such grammar file")
        self._decoder = Decoder(lm=None, fillprob=1e-40, silprob=0.5, **settings)
        try:
            self._decoder.add_jsgf_file("grammar", str(grammar))
            self._decoder.activate_search("grammar")
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{grammar}: not a JSGF grammar with one public rule over words of CMU's dictionary"
            ) from error

    def transcribe(self, waveform: torch.Tensor, rate: int) -> str:
        pcm = (self._prepare(waveform, rate).clamp(-1, 1) * 32767).to(torch.int16)
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return str(hypothesis.hypstr) if hypothesis else ""

    def _prepare(self, waveform: torch.Tensor, rate: int) -> torch.Tensor:
        waveform, _ = load_audio((waveform, rate), RECOGNISER_RATE)
        waveform = waveform * (_LOUDNESS / waveform.square().mean().sqrt().clamp(min=1e-4))
        waveform = torch.nn.functional.pad(waveform, (_RIM_SAMPLES, _RIM_SAMPLES))
        repeats = -(-len(waveform) // len(self._noise))
        return waveform + self._noise.repeat(repeats)[: len(waveform)]


_LOUDNESS = 0.12  # root mean square
_NOISE_LEVEL = 10 ** (-50 / 20)  # -50 dB
_RIM_SAMPLES = RECOGNISER_RATE // 10
_SETTINGS = "every clip afresh"
"""Changed whenever this file processes clips differently, so older scores are not reused."""


class WhisperTranscriber(Transcriber):
    """Whisper through transformers' speech-recognition pipeline; clips over 30 s use its long-form mode.

    Args:
        model: folder or hub name.
        language: spoken language; None: detected.
    """

    def __init__(self, model: str = WHISPER, language: str | None = None, device: str = "cpu"):
        from transformers import pipeline

        try:
            self._pipeline = pipeline(
                "automatic-speech-recognition",
                model=model,
                device=device,
                dtype=torch.float16 if device.startswith("cuda") else torch.float32,
            )
        except OSError as error:
            raise ValueError(
                f"{model}: no Whisper weights there; give --transcriber_path a folder"
            ) from error
        self._arguments = {"task": "transcribe"} | ({"language": language} if language else {})

    def transcribe(self, waveform: torch.Tensor, rate: int) -> str:
        waveform, rate = load_audio((waveform, rate), RECOGNISER_RATE)
        result: Any = self._pipeline(
            {"raw": waveform.numpy(), "sampling_rate": rate},
            return_timestamps=len(waveform) > _WHISPER_WINDOW_SECONDS * rate,  # needed for long-form mode
            generate_kwargs=self._arguments,
        )
        return str(result["text"]).strip()


_WHISPER_WINDOW_SECONDS = 30


class ParaformerTranscriber(Transcriber):
    """Paraformer through FunASR, which users install themselves.

    Args:
        model: folder or hub name.
    """

    def __init__(self, model: str = PARAFORMER, device: str = "cpu"):
        try:
            from funasr import AutoModel
        except ImportError as error:
            raise ValueError("the paraformer transcriber needs FunASR; pip install funasr") from error
        self._model = AutoModel(model=model, device=device, disable_update=True, disable_pbar=True)

    def transcribe(self, waveform: torch.Tensor, rate: int) -> str:
        waveform, rate = load_audio((waveform, rate), RECOGNISER_RATE)
        (result,) = self._model.generate(input=waveform.numpy(), fs=rate)
        return str(result["text"]).strip()


class TranscriberPool:
    """One recogniser in each of several processes; a context manager.

    Clips are submitted as they become available, so recognition runs in parallel with generation and decoding.

    Args:
        config: the recogniser.
        processes: number of processes; 0 recognises in this process, synchronously (for recognisers on a GPU).
    """

    def __init__(self, config: TranscriberConfig, processes: int = 2):
        if processes < 0:
            raise ValueError(f"{processes} recogniser processes: give 0 or more")
        self._in_process = config.open() if processes == 0 else None
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
        result: Future[str] = Future()
        assert self._in_process is not None
        result.set_result(_transcribe(self._in_process, audio))
        return result

    def transcribe(self, audios: Iterable[AudioLike]) -> Iterator[str]:
        """Words of each clip, in order."""
        futures = [self.submit(audio) for audio in audios]
        return (future.result() for future in futures)


def _start_workers(config: TranscriberConfig, processes: int) -> ProcessPoolExecutor:
    # The fork server imports once for all workers, and has neither CUDA nor this process's threads.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
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
