"""Requests, the events of a reply, and the reply that is made of its tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vita_audio.audio import AudioStream, AudioTokenizer
from vita_audio.chat import Example, ReplyParser
from vita_audio.engine import Session, SpeechStream, Stats
from vita_audio.inference.options import CHECKPOINT_OPTIONS, GenerationOptions

Sound = Literal["streamed", "whole", "none"]


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Attributes:
        prompt: token ids, and features with their positions for continuous input.
        options: how the reply is generated.
        sound: decode speech during generation, in one piece at the end, or not at all.
        asked: ``time.perf_counter()`` when the question was asked; None: when the stream starts.
        session: keeps the engine's caches for the next turn of a conversation.
        token_ids: a list to which the reply's ids are added as they are made, without the one that ends it.
    """

    prompt: Example
    options: GenerationOptions = CHECKPOINT_OPTIONS
    sound: Sound = "streamed"
    asked: float | None = None
    session: Session | None = None
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class TextDelta:
    """The next piece of text; ``seconds`` since the question was asked."""

    text: str
    seconds: float


@dataclass(frozen=True)
class AudioChunk:
    """The next piece of speech.

    Attributes:
        samples: (samples,) float32; empty while the decoder holds back its first codes, and always
            empty if speech is not decoded during generation.
        codes: the codes this chunk was decoded from.
        seconds: since the question was asked, including decoding.
    """

    samples: Tensor
    codes: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Timings:
    """Seconds since the question was asked; None for events that did not happen.

    Attributes:
        prompt: the prompt was ready, its audio encoded.
        first_token: the first token left the model.
        first_chunk: the codes of the first audio chunk were complete.
        first_sound: the first samples left the decoder.
        generated: the last token left the model.
        total: the reply was complete.
        new_tokens: tokens generated, including markers and the stop token.
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
        """Speed of generation, from the finished prompt to the last token."""
        return self.new_tokens / max(self.generated - self.prompt, 1e-9)


@dataclass(frozen=True)
class Reply:
    """The model's answer; the last event of a stream.

    Attributes:
        text: without special tokens.
        codes: the speech, in ``[0, codebook_size)``.
        waveform: (samples,) float32; None if there are no codes or decoding was not requested.
        sample_rate: sample rate of ``waveform``, in Hz.
        token_ids: as generated, without the token that ended the reply.
        timings: the time of each step.
        options: how the reply was generated, fully resolved.
        system: the system message of the prompt; None if it had none.
        stats: rounds and drafts of the engine; None if the plain loop made the reply.
    """

    text: str
    codes: list[int]
    waveform: Tensor | None
    sample_rate: int
    token_ids: list[int]
    timings: Timings
    options: GenerationOptions
    system: str | None = None
    stats: Stats | None = None


Event = TextDelta | AudioChunk | Reply


class ReplyAssembly:
    """Makes one reply of its tokens: text, speech, timings.

    Args:
        request: what was asked.
        options: how the reply is generated, resolved.
        tokenizer, codec: of the model.
        speech: decodes this reply's codes beside the model; None: this object decodes them as they come.
    """

    def __init__(
        self,
        request: Request,
        options: GenerationOptions,
        tokenizer: PreTrainedTokenizerBase,
        codec: AudioTokenizer,
        speech: SpeechStream | None = None,
    ) -> None:
        ready = time.perf_counter()
        self.ended = False
        """The reply is complete."""
        self.finished = False
        """No token follows; sound may."""
        self._stats: Stats | None = None
        self._request = request
        self._options = options
        self._codec = codec
        self._parser = ReplyParser(tokenizer)
        self.speech = speech
        own = speech is None and request.sound == "streamed"
        self._sound: AudioStream | None = codec.stream() if own else None
        self._asked = ready if request.asked is None else request.asked
        self._prompt_seconds = ready - self._asked
        self._record = _Record(ids=[] if request.token_ids is None else request.token_ids)

    def push(self, token: int, now: float, ends: bool) -> Iterator[Event]:
        """Add one token, generated at ``now``. Returns the events that it completes."""
        seconds = now - self._asked
        self._record.times.append(seconds)
        if ends:
            return
        self._record.ids.append(token)
        piece = self._parser.push(token)
        if isinstance(piece, str):
            yield self._text(piece, seconds)
        elif piece:
            yield from self._speak(piece, seconds)

    def finish(self, stats: Stats | None = None) -> Iterator[Event]:
        """No token follows. Returns the events that this completes; sound may still come, see :attr:`speaking`."""
        self.finished = True
        self._stats = stats
        seconds = time.perf_counter() - self._asked
        text, codes = self._parser.flush()
        if text:
            yield self._text(text, seconds)
        if codes or (self._sound is not None and self._record.codes):
            yield from self._speak(codes, seconds, last=True)
        if self.speech is not None:
            self.speech.finish()

    @property
    def speaking(self) -> bool:
        """Whether the worker that decodes this reply has sound to come."""
        return self.speech is not None and not self.speech.ended

    def heard(self) -> Iterator[Event]:
        """The sound that the worker has decoded since the last call.

        Raises:
            SpeechError: the codec could not decode the reply.
        """
        if self.speech is None:
            return
        record = self._record
        for chunk in self.speech.take():
            codes = tuple(record.codes[record.codes_heard : chunk.codes])
            record.codes_heard = chunk.codes
            yield AudioChunk(chunk.samples, codes, self._hear(chunk.samples, chunk.decoded_at))

    def end(self) -> Iterator[Event]:
        """The remaining events, ending with the reply."""
        if not self.finished:
            yield from self.finish()
        yield from self.heard()
        self.ended = True
        yield self._reply()

    def cancel(self) -> None:
        """The reply is not wanted any more."""
        if self.speech is not None:
            self.speech.cancel()

    def _text(self, text: str, seconds: float) -> TextDelta:
        self._record.text += text
        return TextDelta(text, seconds)

    def _speak(self, codes: tuple[int, ...], seconds: float, last: bool = False) -> Iterator[Event]:
        record = self._record
        if record.first_chunk is None:
            record.first_chunk = seconds
        record.codes += codes
        if self.speech is not None:
            self.speech.push(codes)
            return
        samples = torch.empty(0) if self._sound is None else self._sound.push(codes, last=last)
        yield AudioChunk(samples, codes, self._hear(samples))

    def _hear(self, samples: Tensor, now: float | None = None) -> float:
        """Record samples that were decoded ``now``. Returns the seconds since the question was asked."""
        seconds = (time.perf_counter() if now is None else now) - self._asked
        self._record.samples.append(samples)
        if len(samples) and self._record.first_sound is None:
            self._record.first_sound = seconds
        return seconds

    def _reply(self) -> Reply:
        record = self._record
        waveform = None
        if record.codes and self._request.sound == "whole":
            waveform = self._codec.decode(record.codes)
            self._hear(waveform)
        elif record.codes and record.samples and self._request.sound == "streamed":
            waveform = torch.cat(record.samples)
        return Reply(
            text=record.text,
            codes=record.codes,
            waveform=waveform,
            sample_rate=self._codec.sample_rate,
            token_ids=record.ids,
            timings=Timings(
                prompt=self._prompt_seconds,
                first_token=record.times[0] if record.times else None,
                first_chunk=record.first_chunk,
                first_sound=record.first_sound,
                generated=record.times[-1] if record.times else self._prompt_seconds,
                total=time.perf_counter() - self._asked,
                new_tokens=len(record.times),
            ),
            options=self._options,
            stats=self._stats,
        )


@dataclass
class _Record:
    """The parts of one reply so far; times in seconds since the question was asked."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    codes: list[int] = field(default_factory=list)
    codes_heard: int = 0
    samples: list[Tensor] = field(default_factory=list)
    first_chunk: float | None = None
    first_sound: float | None = None
