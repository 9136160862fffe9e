"""One model behind the server: slots, queue, replies as asynchronous streams, an orderly end.

Each reply runs in a thread that waits for the engine's events; the engine's rounds run in its own thread. There are as
many slots as the engine has rows, so a request waits here, where it can be refused or abandoned, and not in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from vita_audio.audio import AudioError, AudioLike, load_audio
from vita_audio.audio.sandbox import ClipProcess
from vita_audio.inference import (
    AudioChunk,
    Conversation,
    EngineBackend,
    Event,
    GenerationOptions,
    Reply,
    Request,
    SpeechPipeline,
)
from vita_audio.inference.engine_backend import LONGEST
from vita_audio.inference.replies import Sound
from vita_audio.models.configuration import num_positions
from vita_audio.serving import detection
from vita_audio.serving.config import ServeOptions
from vita_audio.serving.errors import ApiError, draining, failure, overloaded
from vita_audio.serving.metrics import Metrics, Player
from vita_audio.serving.sessions import Sessions

_logger = logging.getLogger("vita_audio.serving")

DEFAULT_VOICE = "default"
"""The model's own voice."""

Stream = Callable[[], Generator[Event, None, None]]
"""Begins a reply."""

_WARM_UP = "one two three"
_SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus")


class Service:
    """Answers requests with one pipeline.

    Args:
        pipeline: model, tokenizer and codec; its engine gets a row for each slot.
        options: limits and folders.
        name: of the model, for clients.

    Raises:
        ValueError: the folder of voices holds a file that is no sound.
    """

    def __init__(self, pipeline: SpeechPipeline, options: ServeOptions, name: str):
        if isinstance(pipeline.backend, EngineBackend):
            pipeline.backend.max_rows = options.slots
        self.pipeline = pipeline
        self.options = options
        self.name = options.served_name or name
        self.voices = read_voices(options.voices_dir)
        self.metrics = Metrics()
        self.clips = ClipProcess(options.audio_seconds)
        self.ready = False
        self.draining = False
        self._threads = ThreadPoolExecutor(options.slots + 4, thread_name_prefix="reply")
        self._free = asyncio.Semaphore(options.slots)
        self._sessions = Sessions(options.sessions_per_key)
        self._works = 0
        self._waiting = 0
        self._busy = 0

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Run the engine; ready after a reply to nobody. Then end all threads and processes."""
        backend = self.pipeline.backend
        engine = backend.engine.running() if isinstance(backend, EngineBackend) else nullcontext()
        try:
            with engine:
                self.clips.start()
                detection.load_model()
                self.pipeline.synthesize(_WARM_UP, options=GenerationOptions.greedy(max_new_tokens=32))
                self.ready = True
                yield
        finally:
            self.ready = False
            self.clips.close()
            self._threads.shutdown(cancel_futures=True)

    @property
    def idle(self) -> bool:
        """Whether no work is counted; see :meth:`work`."""
        return not self._works

    @contextmanager
    def work(self) -> Generator[None, None, None]:
        """Count a request or a realtime reply from its beginning to its end; a server that drains waits for it.

        Raises:
            ApiError: the server is draining.
        """
        if self.draining:
            raise draining()
        self._works += 1
        try:
            yield
        finally:
            self._works -= 1

    async def until_idle(self) -> None:
        """Return when no reply is left, or after ``drain_seconds``."""
        deadline = time.monotonic() + self.options.drain_seconds
        while not self.idle and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    @property
    def voice_names(self) -> list[str]:
        """Names of all voices, the model's own first."""
        return [DEFAULT_VOICE, *self.voices]

    def voice(self, name: str, param: str) -> AudioLike | None:
        """The voice prompt of a name; None for the model's own voice.

        Raises:
            ApiError: there is no such voice.
        """
        if name == DEFAULT_VOICE:
            return None
        if name not in self.voices:
            message = f"{param}: there is no voice {name!r}; known: {', '.join(self.voice_names)}"
            raise ApiError(message, param, code="invalid_value")
        return self.voices[name]

    @contextmanager
    def session_of(self, key: str) -> Generator[None, None, None]:
        """Count an open realtime connection; see :meth:`Sessions.opened`."""
        with self._sessions.opened(key), self.metrics.sessions.track_inprogress():
            yield

    def check_model(self, name: str) -> None:
        """Refuse the name of another model.

        Raises:
            ApiError: the model is not served here.
        """
        if name != self.name:
            message = f"model: {name!r} is not served here, {self.name!r} is"
            raise ApiError(message, "model", 404, "model_not_found")

    async def decode(self, encoded: bytes, param: str) -> AudioLike:
        """A sound file of a client as a clip, decoded in a process of its own.

        Args:
            encoded: the file.
            param: the field that holds it.

        Raises:
            ApiError: the clip cannot be read, or is too long.
        """
        try:
            return await asyncio.to_thread(self.clips.decode, encoded)
        except AudioError as error:
            reason = str(error).removeprefix("audio bytes: ")
            raise ApiError(f"{param}: {reason}", param, code="invalid_audio") from error

    async def prepare(
        self, conversation: Conversation, options: GenerationOptions, sound: Sound, param: str
    ) -> Request:
        """A conversation as the backend's request; its clock starts now. See also :meth:`fitted`.

        Args:
            conversation: the prompt.
            options: how the reply is generated.
            sound: whether it is decoded.
            param: the field at fault if the conversation cannot be used.

        Raises:
            ApiError: the conversation cannot be used, or is too long for the model.
        """
        if self.options.log_content:
            _logger.info("request: %s", " | ".join(message.content for message in conversation.messages))
        try:
            request = await asyncio.to_thread(self.pipeline.request, conversation, options, sound)
        except ValueError as error:
            raise ApiError(f"{param}: {error}", param, code="invalid_value") from error
        return self.fitted(request, param)

    def fitted(self, request: Request, param: str) -> Request:
        """A request whose reply has at most the room that the prompt leaves.

        Raises:
            ApiError: the prompt leaves none; ``param`` is the field at fault.
        """
        longest = min(num_positions(self.pipeline.model.config), LONGEST)
        room = longest - len(request.prompt)
        if room < 1:
            message = f"{param}: has {len(request.prompt)} tokens; the model reads at most {longest}"
            raise ApiError(message, param, code="context_length_exceeded")
        fitting = min(request.options.max_new_tokens, room)
        return replace(request, options=replace(request.options, max_new_tokens=fitting))

    def reply(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of the reply to a prepared request; see :meth:`events`."""
        return self.events(partial(self.pipeline.backend.stream, request))

    async def events(self, stream: Stream) -> AsyncGenerator[Event, None]:
        """The events of a reply, when a slot is free for it. Closing the iterator ends the reply.

        Raises:
            ApiError: the server is busy, the request cannot be answered, or the reply took too long.
        """
        async with self._slot():
            outcome = "abandoned"
            player = Player(self.pipeline.codec.sample_rate)
            try:
                async with _Reply(stream, self._threads, self.options.reply_seconds) as reply:
                    async for event in reply:
                        if isinstance(event, AudioChunk):
                            player.hear(event)
                        elif isinstance(event, Reply):
                            outcome = "complete"
                            self.metrics.observe(event)
                            if self.options.log_content:
                                _logger.info("reply: %s", event.text)
                        yield event
            except TimeoutError:
                outcome = "timeout"
                limit = f"{self.options.reply_seconds:g} s"
                raise ApiError(f"the reply took longer than {limit}", None, 504, "timeout") from None
            except ApiError:
                outcome = "refused"
                raise
            except ValueError as error:
                outcome = "refused"
                raise ApiError(str(error).splitlines()[0], code="invalid_value") from error
            except Exception as error:
                outcome = "failed"
                raise failure(error) from error
            finally:
                self.metrics.underruns.inc(player.underruns)
                self.metrics.replies.labels(outcome).inc()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        if self._free.locked() and self._waiting >= self.options.queue:
            raise overloaded()
        self._waiting += 1
        self.metrics.waiting.set(self._waiting)
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
            self.metrics.waiting.set(self._waiting)
        self._busy += 1
        self.metrics.slots.set(self._busy)
        try:
            yield
        finally:
            self._busy -= 1
            self.metrics.slots.set(self._busy)
            self._free.release()


class _Reply:
    """A reply that runs in a thread, as an asynchronous iterator. Leaving the context waits until it has ended.

    The iterator raises TimeoutError after ``seconds``.
    """

    def __init__(self, stream: Stream, threads: ThreadPoolExecutor, seconds: float):
        self._stream = stream
        self._threads = threads
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
        self._unwanted = threading.Event()

    async def __aenter__(self) -> AsyncIterator[Event]:
        self._ended = self._loop.run_in_executor(self._threads, self._run)
        return self._each()

    async def __aexit__(self, *_: object) -> None:
        self._unwanted.set()
        # The slot must not be free before the row is, not even where this task is cancelled meanwhile.
        await _certainly(self._ended)

    async def _each(self) -> AsyncIterator[Event]:
        while True:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            yield event

    def _run(self) -> None:
        try:
            with closing(self._stream()) as events:
                for event in events:
                    if self._unwanted.is_set():
                        return
                    self._tell(event)
            self._tell(None)
        except BaseException as error:
            self._tell(error)

    def _tell(self, event: Event | BaseException | None) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)


async def _certainly(ended: asyncio.Future[None]) -> None:
    """Wait for a future although this task may be cancelled; the cancellation counts afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not ended.done():
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def read_voices(folder: Path | None) -> dict[str, AudioLike]:
    """The voice prompts of a folder by name, decoded.

    Raises:
        ValueError: there is no such folder, a file is no sound, or a name is taken.
    """
    voices: dict[str, AudioLike] = {}
    if folder is None:
        return voices
    if not folder.is_dir():
        raise ValueError(f"voices_dir {folder}: there is no such folder")
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in _SOUND_FILES:
            if file.stem == DEFAULT_VOICE or file.stem in voices:
                raise ValueError(f"{file}: the name of this voice is taken; rename the file")
            voices[file.stem] = load_audio(file)
    return voices
