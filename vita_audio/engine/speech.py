"""Codes to sound beside the language model: one worker decodes the speech of all replies.

    with SpeechWorker(codec) as speech:
        reply = speech.open()
        reply.push(codes)  # as the model emits them; returns at once
        reply.finish()
        for chunk in reply:
            play(chunk.samples)

A stream is due when it has the codes of its next chunk. A step of the worker decodes one chunk of a due stream and
of those that share its pass through the codec (:meth:`AudioTokenizer.sharing`). Streams that have not been heard
yet come first, then those whose last chunk is oldest. So a first chunk waits for at most one pass.

A stream's samples are those it gets alone, as from ``stream.push(codes)`` and ``stream.push([], last=True)``. The
codec cuts chunks by the number of codes, and the worker gives it the codes of one chunk at a time and never the end
with a full chunk. So neither company nor the moment at which codes arrive matters.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from vita_audio.audio import AudioStream, AudioTokenizer
from vita_audio.audio.base import check_codes

_logger = logging.getLogger(__name__)


class SpeechError(RuntimeError):
    """The codec could not decode a stream."""


@dataclass(frozen=True)
class SpeechChunk:
    """The next piece of a reply's speech.

    Attributes:
        samples: (samples,) float32 in [-1, 1], on the CPU; never empty.
        codes: codes of the reply that the codec has taken so far; it may hold back the sound of the last few.
        decoded_at: ``time.perf_counter()`` when the samples were ready.
    """

    samples: Tensor
    codes: int
    decoded_at: float


@dataclass(frozen=True)
class SpeechEnd:
    """The last event of a stream that was not cancelled; ``error`` in one line, or None if all codes were decoded."""

    error: str | None = None


SpeechEvent: TypeAlias = SpeechChunk | SpeechEnd


class SpeechWorker:
    """Decodes the speech of many replies with one codec.

    Args:
        codec: the codec; its decoder is loaded here.
        threaded: decode in a thread of the worker, on a CUDA stream of its own if the codec is on a GPU. Otherwise
            decoding takes place in :meth:`step`, which the caller calls between other work; also while it iterates over
            a stream.

    Raises:
        ValueError: the codec cannot decode.
    """

    def __init__(self, codec: AudioTokenizer, *, threaded: bool = True):
        codec.stream()  # loads the weights
        self._codec = codec
        self._changed = threading.Condition()  # guards everything below, and all fields of the streams
        self._decoders: dict[SpeechStream, AudioStream] = {}  # of the streams that have not ended
        self._steps = 0
        self._closed = False
        self._stepping = threading.Lock()
        self._cuda_stream: torch.cuda.Stream | None = None
        self._thread: threading.Thread | None = None
        if threaded:
            if codec.device.type == "cuda":
                self._cuda_stream = torch.cuda.Stream(codec.device)
                self._cuda_stream.wait_stream(torch.cuda.current_stream(codec.device))  # the weights
            self._thread = threading.Thread(target=self._run, name="speech", daemon=True)
            self._thread.start()

    @property
    def threaded(self) -> bool:
        """Whether the worker decodes in a thread of its own."""
        return self._thread is not None

    def open(
        self,
        generator: torch.Generator | None = None,
        on_event: Callable[[SpeechEvent], None] | None = None,
    ) -> SpeechStream:
        """A fresh stream.

        Args:
            generator: source of the codec's noise, used by this stream only; None for a fixed seed.
            on_event: called with each event in the thread that decodes, which waits for it; None to iterate over the
                stream instead. Must not call :meth:`step`.

        Raises:
            RuntimeError: the worker is closed.
        """
        stream, decoder = SpeechStream(self, on_event), self._codec.stream(generator)
        with self._changed:
            if self._closed:
                raise RuntimeError("the speech worker is closed")
            self._decoders[stream] = decoder
        return stream

    def step(self) -> bool:
        """Decode the next chunk of the streams whose turn it is. Returns whether there was one."""
        with self._stepping:
            with self._changed:
                work = self._next_work()
            if not work:
                return False
            for part, result in zip(work, self._decode(work), strict=True):
                self._deliver(part, result)
            return True

    def wait(self, streams: Sequence[SpeechStream]) -> None:
        """Return when one of the streams has a chunk or has ended, or after a second."""
        with self._changed:
            self._changed.wait_for(lambda: any(each._ready or each.ended for each in streams), timeout=1.0)

    def close(self) -> None:
        """Cancel all streams and end the thread, after the pass in progress. May be called twice."""
        with self._changed:
            self._closed = True
            for stream in [*self._decoders]:
                stream.cancel()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> SpeechWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            with self._on_own_stream():
                while True:
                    with self._changed:
                        while not self._closed and not self._due():
                            self._changed.wait()
                        if self._closed:
                            return
                    self.step()
        except BaseException as error:
            with self._changed:
                self._closed = True
                streams = [*self._decoders]
            for stream in streams:
                stream._end(SpeechEnd(_one_line(error)))
            raise

    def _on_own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._cuda_stream is None else torch.cuda.stream(self._cuda_stream)

    def _due(self) -> list[SpeechStream]:
        """Streams with work, in the order of their turns."""
        due = [stream for stream, decoder in self._decoders.items() if stream._is_due(decoder)]
        return sorted(due, key=lambda stream: stream._turn)

    def _next_work(self) -> list[_Work]:
        """The codes of the chunks to decode next; takes them from their streams."""
        due = {self._decoders[stream]: stream for stream in self._due()}
        if not due:
            return []
        self._steps += 1
        return [due[decoder]._take_codes(decoder) for decoder in self._codec.sharing([*due])]

    def _decode(self, work: Sequence[_Work]) -> list[Tensor | str]:
        """New samples of each part, or why there are none.

        A pass that fails leaves its streams unchanged. If several shared it, each is tried alone, so an error
        ends only the streams that cause it.
        """
        try:
            with torch.inference_mode():
                return [
                    *self._codec.push_many(
                        [part.decoder for part in work],
                        [part.codes for part in work],
                        [part.last for part in work],
                    )
                ]
        except Exception as error:
            if len(work) == 1:
                return [_one_line(error)]
        return [result for part in work for result in self._decode([part])]

    def _deliver(self, part: _Work, result: Tensor | str) -> None:
        stream = part.stream
        if isinstance(result, str):
            stream._end(SpeechEnd(result))
            return
        if len(result):
            stream._send(SpeechChunk(result, part.total_codes, time.perf_counter()))
        if part.last:
            stream._end(SpeechEnd())


class SpeechStream:
    """The speech of one reply; iterate over it for its chunks. Made by :meth:`SpeechWorker.open`."""

    def __init__(self, worker: SpeechWorker, on_event: Callable[[SpeechEvent], None] | None):
        self._worker = worker
        self._on_event = on_event
        self._changed = worker._changed
        self._waiting: list[int] = []
        self._taken = 0  # codes that the codec has
        self._turn = 0  # step of the last chunk; 0 until the stream is heard
        self._finished = False
        self._end_event: SpeechEnd | None = None
        self._ready: deque[SpeechChunk] = deque()

    @property
    def ended(self) -> bool:
        """Whether all codes are decoded, or the stream failed or was cancelled."""
        return self._end_event is not None

    def push(self, codes: Sequence[int]) -> None:
        """Add the next codes of the reply; may be empty. Returns at once. Codes of an ended stream are ignored.

        Raises:
            ValueError: a code is out of range, or the reply is finished; the stream is unchanged.
        """
        check_codes(codes, self._worker._codec.codebook_size)
        with self._changed:
            if self._finished:
                raise ValueError("codes were pushed to a reply that is finished")
            if not self.ended:
                self._waiting += [int(code) for code in codes]
                self._changed.notify_all()

    def finish(self) -> None:
        """Say that the reply is complete, so that what the codec holds back is decoded too. Returns at once."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def cancel(self) -> None:
        """End the stream at once. Chunks that were not collected are dropped, and no further event begins."""
        with self._changed:
            self._ready.clear()
            if not self.ended:
                self._end_event = SpeechEnd()
                self._release()

    def take(self) -> list[SpeechChunk]:
        """The chunks that are ready and were not collected yet, without waiting.

        Raises:
            SpeechError: the codec failed, and no chunk is left.
        """
        with self._changed:
            chunks = [*self._ready]
            self._ready.clear()
            if not chunks:
                self._raise_error()
            return chunks

    def __iter__(self) -> Iterator[SpeechChunk]:
        return self

    def __next__(self) -> SpeechChunk:
        """The next chunk, when it is ready.

        Raises:
            SpeechError: the codec failed.
            RuntimeError: the worker has no thread, and more codes or the end are needed first.
        """
        threaded = self._worker._thread is not None
        while True:
            with self._changed:
                while threaded and not self._ready and not self.ended:
                    self._changed.wait()
                if self._ready:
                    return self._ready.popleft()
                if self.ended:
                    self._raise_error()
                    raise StopIteration
            if not self._worker.step():
                raise RuntimeError("nothing is due: push more codes or finish the reply")

    def _is_due(self, decoder: AudioStream) -> bool:
        return self._finished or len(self._waiting) >= decoder.missing

    def _take_codes(self, decoder: AudioStream) -> _Work:
        """The codes of the next chunk; the end comes with fewer codes than a chunk has."""
        count = decoder.missing
        last = len(self._waiting) < count
        codes, self._waiting = self._waiting[:count], self._waiting[count:]
        self._taken += len(codes)
        return _Work(self, decoder, codes, last, self._taken)

    def _send(self, chunk: SpeechChunk) -> None:
        with self._changed:
            if self.ended:
                return
            self._turn = self._worker._steps
            if self._on_event is None:
                self._ready.append(chunk)
                self._changed.notify_all()
                return
        self._call(chunk)

    def _end(self, event: SpeechEnd) -> None:
        with self._changed:
            if self.ended:
                return
            self._end_event = event
            call = self._on_event is not None
            self._release()
        if call:
            self._call(event)

    def _call(self, event: SpeechEvent) -> None:
        """Call back. An error there ends this stream; the worker goes on."""
        assert self._on_event is not None
        try:
            self._on_event(event)
        except Exception as error:
            _logger.warning("a speech stream was cancelled: its callback failed: %s", _one_line(error))
            self.cancel()

    def _release(self) -> None:
        """Forget codes and decoder state; wake those who wait for chunks."""
        self._waiting = []
        self._worker._decoders.pop(self, None)
        self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._end_event is not None and self._end_event.error is not None:
            raise SpeechError(self._end_event.error)


@dataclass(frozen=True)
class _Work:
    """Codes of one chunk on their way through the codec; ``total_codes`` of the reply include them."""

    stream: SpeechStream
    decoder: AudioStream
    codes: list[int]
    last: bool
    total_codes: int


def _one_line(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
