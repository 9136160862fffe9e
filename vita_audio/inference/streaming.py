"""A reply while it is being generated: text and sound as soon as they exist.

The model emits one stream of ids in which text and speech codes alternate. ``ReplySplitter``
sorts them as they come; ``stream_reply`` runs generation in a thread and decodes speech in step
with it, so that the listener hears the first chunk while the model is still writing. In Boost
and Turbo that chunk comes out of the prefill round.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from vita_audio.audio import AudioTokenizer
from vita_audio.constants import END_OF_AUDIO, audio_token
from vita_audio.inference.engine import TokenTap

CHUNK_CODES = 8
"""Codes of one chunk: what a schedule's ``10`` holds beside its two markers."""


@dataclass(frozen=True)
class TextDelta:
    """Text that follows what came before; ``seconds`` since the question was asked."""

    text: str
    seconds: float


@dataclass(frozen=True)
class AudioChunk:
    """Speech that follows what came before.

    Attributes:
        samples: (samples,) float32; empty while the decoder holds its first codes back.
        codes: the codes this chunk was decoded from.
        seconds: since the question was asked, decoding included.
    """

    samples: torch.Tensor
    codes: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Timings:
    """Seconds since the question was asked; None for what never came.

    Attributes:
        prompt: the prompt was ready, its audio encoded.
        first_token: the first token left the model.
        first_chunk: the codes of the first audio chunk were complete.
        first_sound: the first samples left the decoder (streaming only).
        generated: the last token left the model.
        total: the reply was complete.
        new_tokens: tokens generated, markers and the stop token not counted apart.
    """

    prompt: float
    first_token: float | None
    first_chunk: float | None
    first_sound: float | None
    generated: float
    total: float
    new_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of generation: from the finished prompt to the last token."""
        return self.new_tokens / max(self.generated - self.prompt, 1e-9)


class ReplySplitter:
    """Sorts the ids of one reply, one at a time, into text and chunks of speech codes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, codebook_size: int):
        self._tokenizer = tokenizer
        self._first_audio = tokenizer.convert_tokens_to_ids(audio_token(0))
        self._audio_ids = range(self._first_audio, self._first_audio + codebook_size)
        self._end_of_audio = tokenizer.convert_tokens_to_ids(END_OF_AUDIO)
        self._held_text: list[int] = []
        self._held_codes: list[int] = []

    def push(self, token: int) -> str | tuple[int, ...] | None:
        """What this token completes: text, a chunk of codes, or nothing yet."""
        if token in self._audio_ids:
            self._held_codes.append(token - self._first_audio)
            return self._take_codes() if len(self._held_codes) >= CHUNK_CODES else None
        if token == self._end_of_audio:
            return self._take_codes() if self._held_codes else None
        if token >= len(self._tokenizer):  # a padding row of the embedding names no token
            return None
        self._held_text.append(token)
        text = self._decode_text()
        if text.endswith("\ufffd"):  # the middle of a character of several bytes
            return None
        self._held_text.clear()
        return text or None

    def flush(self) -> tuple[str, tuple[int, ...]]:
        """Text and codes still held when the reply ends."""
        text, codes = self._decode_text(), self._take_codes()
        self._held_text.clear()
        return text, codes

    def _decode_text(self) -> str:
        return self._tokenizer.decode(
            self._held_text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _take_codes(self) -> tuple[int, ...]:
        codes = tuple(self._held_codes)
        self._held_codes.clear()
        return codes


@dataclass
class Transcript:
    """What a stream has produced so far; the caller's, so that it survives a stream cut short."""

    token_times: list[float] = field(default_factory=list)
    text: str = ""
    codes: list[int] = field(default_factory=list)
    samples: list[torch.Tensor] = field(default_factory=list)
    first_chunk: float | None = None
    first_sound: float | None = None


def stream_reply(
    generate: Callable[[TokenTap, StoppingCriteria], None],
    splitter: ReplySplitter,
    codec: AudioTokenizer,
    transcript: Transcript,
    started: float,
    stop_ids: frozenset[int],
) -> Iterator[TextDelta | AudioChunk]:
    """Run ``generate`` in a thread and yield its reply piece by piece.

    Closing the iterator early stops generation after the current token. An exception inside
    ``generate`` is raised here.

    Args:
        generate: runs the model with the streamer and stopping criterion it is given.
        transcript: filled while the stream runs.
        started: ``time.perf_counter()`` when the question was asked.
        stop_ids: tokens that end the reply; no text.
    """
    tokens: queue.SimpleQueue[tuple[int, float] | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def run() -> None:
        tap = TokenTap(lambda token: tokens.put((token, time.perf_counter() - started)))
        try:
            generate(tap, _StopWhenSet(cancelled))
            tokens.put(None)
        except BaseException as error:
            tokens.put(error)

    audio = codec.stream()

    def decode(codes: tuple[int, ...], last: bool = False) -> Iterator[AudioChunk]:
        samples = audio.push(codes, last=last)
        seconds = time.perf_counter() - started
        transcript.codes += codes
        transcript.samples.append(samples)
        if len(samples) and transcript.first_sound is None:
            transcript.first_sound = seconds
        if codes or len(samples):
            yield AudioChunk(samples, codes, seconds)

    thread = threading.Thread(target=run, name="generation", daemon=True)
    thread.start()
    try:
        while (item := tokens.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            token, seconds = item
            transcript.token_times.append(seconds)
            if token in stop_ids:
                continue
            piece = splitter.push(token)
            if isinstance(piece, str):
                transcript.text += piece
                yield TextDelta(piece, seconds)
            elif piece:
                if transcript.first_chunk is None:
                    transcript.first_chunk = seconds
                yield from decode(piece)
        text, codes = splitter.flush()
        if text:
            transcript.text += text
            yield TextDelta(text, time.perf_counter() - started)
        if codes or transcript.codes:
            yield from decode(codes, last=True)
    finally:
        cancelled.set()
        thread.join()


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)
