"""The engine: requests in, tokens out, round by round.

    engine = Engine(model, max_rows=8)
    for event in engine.submit(Request(prompt, schedule="boost", stop_tokens=[end])):
        ...                                   # Tokens as rounds end, then Finished

Requests join and leave between rounds. Rows in use are the first ones of the state, and a row that ends gives its
place to the last one. Without :meth:`Engine.running`, rounds run in the thread that waits for an event.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import TYPE_CHECKING

import torch

from vita_audio.engine.requests import Finished, Handle, Reason, Request
from vita_audio.engine.rounds import BURST
from vita_audio.engine.scheduler import Scheduler
from vita_audio.engine.sessions import Session
from vita_audio.engine.state import State
from vita_audio.engine.table import RowTable, Running
from vita_audio.engine.turns import Turns
from vita_audio.engine.weights import AudioRows, Quantization, Weights
from vita_audio.models.configuration import num_positions
from vita_audio.models.schedule import Schedule

if TYPE_CHECKING:
    from vita_audio.models import Qwen2MTPForCausalLM


class Engine:
    """Runs the rounds of many requests on one model.

    Args:
        model: any causal LM of the family, on its device; its weights are copied into the layout of the device.
        max_rows: requests and idle sessions whose caches are held at once; more requests wait.
        max_length: tokens of a row, prompt and reply together; None: the model's limit, 8192 at most.
        speech: ids of the vocabulary's markers of speech; without them no request can restrict its rows.
        prompt_chunk: tokens of a prompt that are computed at once while others wait for their round; None: what
            suits the device.
        quantization: see :class:`~vita_audio.engine.weights.Weights`.
        free: see there.

    Raises:
        ValueError: the engine cannot run this model, cannot quantize on its device, or a number is out of range.
    """

    def __init__(
        self,
        model: Qwen2MTPForCausalLM,
        max_rows: int = 8,
        max_length: int | None = None,
        speech: AudioRows | None = None,
        prompt_chunk: int | None = None,
        quantization: Quantization = "none",
        free: bool = False,
    ):
        limit = num_positions(model.config)
        length = min(limit, 8192) if max_length is None else max_length
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: give 1 or more")
        if not 1 <= length <= limit:
            raise ValueError(f"max_length={length}: the model's positions end at {limit}")
        with torch.inference_mode():
            self._weights = Weights(model, speech, quantization, free)
            # The last round of a reply may run past its end.
            surplus = BURST + self._weights.num_heads
            state = State(self._weights, max_rows, length + surplus, most=surplus)
        self._max_length = length
        while_others_wait = 64 if self._weights.device.type == "cpu" else 512
        self._scheduler = Scheduler(prompt_chunk or while_others_wait, prompt_chunk or 512)
        self._table = RowTable(self._weights, state)
        self._turns = Turns(self._weights, state, self._table, self._scheduler)
        self._waiting: deque[Handle] = deque()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._error: BaseException | None = None

    @property
    def max_length(self) -> int:
        """Tokens of a row, prompt and reply together."""
        return self._max_length

    def session(self) -> Session:
        """A new conversation. Close it with :meth:`close_session` to free its caches."""
        return Session(seen_heads=[0] * self._weights.num_heads)

    def close_session(self, session: Session) -> None:
        """Free a session's row. A reply that runs in it is cancelled."""
        with self._lock:
            session.closed = True
            for running in self._table.running:
                if running.session is session:
                    running.handle.cancelling = True
            if not session.busy:
                self._table.drop(session)

    def submit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            ValueError: the request is empty, too long, or asks for what this engine cannot do.
        """
        self._check(request)
        handle = Handle(request, self)
        with self._lock:
            if request.session is not None:
                if request.session.closed or request.session.busy:
                    raise ValueError("session: it is closed, or another request runs in it")
                request.session.busy = True
            self._waiting.append(handle)
            self._work.notify_all()
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request; see :meth:`Handle.cancel`."""
        with self._lock:
            handle.cancelling = True
            if handle in self._waiting:
                self._waiting.remove(handle)
                if handle.request.session is not None:
                    handle.request.session.busy = False
                self._finish_handle(handle, "cancelled")
            elif self._thread is None:
                self._end_unwanted()

    def wait(self, *handles: Handle) -> None:
        """Return when one of the handles may have an event: run a turn, or wait for the engine's thread."""
        with self._work:
            if self._error is not None:
                raise RuntimeError("the engine's thread failed") from self._error
            if any(handle.finished is not None or handle.has_events for handle in handles):
                return
            if self._thread is not None:
                self._work.wait(timeout=1.0)
                return
        self.step()

    @property
    def weights(self) -> Weights:
        """The model's weights in the engine's layout; benchmarks ask it for bytes."""
        return self._weights

    @property
    def num_heads(self) -> int:
        """Heads of the model."""
        return self._weights.num_heads

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._table.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run rounds in a thread of the engine's own while the context is open; then cancel what still runs."""
        if self._thread is not None:
            raise RuntimeError("the engine is running already")
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            with self._work:
                self._stopping = True
                self._work.notify_all()
            self._thread.join()
            self._thread = None
            with self._lock:
                for handle in [*self._waiting, *(running.handle for running in self._table.running)]:
                    self.cancel(handle)

    def _loop(self) -> None:
        try:
            while True:
                with self._work:
                    while not self._stopping and not self._table.running and not self._waiting:
                        self._work.wait()
                    if self._stopping:
                        return
                self.step()
        except BaseException as error:
            with self._work:
                self._error = error
                self._work.notify_all()
            raise

    @torch.inference_mode()
    def step(self) -> bool:
        """Run one turn: a chunk of a prompt, or a round. Returns whether there was anything to do."""
        # Recordings and kernels of our own run on the current device, whichever the tensors are on.
        with self._work, torch.accelerator.device_index(self._weights.device.index):
            self._end_unwanted()
            self._admit()
            turn = self._scheduler.next(self._table.running)
            if turn is None:
                return False
            if turn.kind == "prompt":
                self._turns.compute_prompt(turn.first)
            else:
                for running, reason in self._turns.run_round(turn):
                    self._end(running, reason)
            self._work.notify_all()
            return True

    # -- requests ---------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        if not len(request.prompt):
            raise ValueError("prompt: give at least one token")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={request.max_new_tokens}: give 1 or more")
        if len(request.prompt) + request.max_new_tokens > self.max_length:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens} exceed this "
                f"engine's max_length of {self.max_length}"
            )
        lowest, highest = min(request.prompt), max(request.prompt)
        if lowest < 0 or highest >= self._weights.vocab_size:
            raise ValueError(
                f"prompt: token {lowest if lowest < 0 else highest} is not in 0 to {self._weights.vocab_size - 1}"
            )
        if request.audio_rows not in ("auto", "on", "off"):
            raise ValueError(f"audio_rows={request.audio_rows!r}: use auto, on or off")
        if request.audio_rows != "off" and self._weights.audio_rows is None:
            raise ValueError(
                f"audio_rows={request.audio_rows}: this engine was not told which rows are speech"
            )
        if request.lossless and not self._weights.num_heads:
            raise ValueError("lossless: the model has no heads to draft with; use the schedule vanilla")
        if request.embeds is not None and request.embeds.shape != (len(request.prompt), self._weights.d):
            raise ValueError(
                f"embeds: give {len(request.prompt)} rows of {self._weights.d}, got {tuple(request.embeds.shape)}"
            )
        try:
            tuple(map(index, request.stop_tokens))
        except TypeError:
            raise ValueError(f"stop_tokens={request.stop_tokens}: give token ids") from None
        Schedule.parse(request.schedule)

    def _admit(self) -> None:
        """Give waiting requests a row."""
        while self._waiting and not self._table.is_full:
            handle = self._waiting.popleft()
            session = handle.request.session or self.session()
            session.busy = True
            self._table.start(handle, session)

    def _end(self, running: Running, reason: Reason) -> None:
        self._table.end(running)
        self._finish_handle(running.handle, reason)

    @torch.inference_mode()
    def _end_unwanted(self) -> None:
        now = time.perf_counter()
        for running in list(self._table.running):
            timeout = running.request.timeout
            if running.handle.cancelling:
                self._end(running, "cancelled")
            elif timeout is not None and now - running.handle.submitted > timeout:
                self._end(running, "deadline")
        for handle in list(self._waiting):
            timeout = handle.request.timeout
            if timeout is not None and now - handle.submitted > timeout:
                self._waiting.remove(handle)
                if handle.request.session is not None:
                    handle.request.session.busy = False
                self._finish_handle(handle, "deadline")

    def _finish_handle(self, handle: Handle, reason: Reason) -> None:
        handle.stats.seconds = time.perf_counter() - handle.submitted
        handle.push(Finished(reason, handle.stats))
        self._work.notify_all()
