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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vita_audio.engine.graphs import Graphs
from vita_audio.engine.requests import Finished, Handle, Reason, Request, Tokens
from vita_audio.engine.rounds import BURST, Checks, Modes, Plan, Round, Shapes
from vita_audio.engine.sampling import Drawing, Rules
from vita_audio.engine.scheduler import Scheduler, segments
from vita_audio.engine.sessions import Session
from vita_audio.engine.speculation import DraftLength
from vita_audio.engine.state import State
from vita_audio.engine.steps import heads_pass, prompt_pass
from vita_audio.engine.weights import AudioRows, Weights
from vita_audio.models.schedule import Schedule

if TYPE_CHECKING:
    from vita_audio.models import Qwen2MTPForCausalLM

LARGEST_LAG = 64
"""Positions that heads may lag behind the backbone before a pass of their own brings them up."""


@dataclass(eq=False)
class Running:
    """A request that has a row."""

    handle: Handle
    session: Session
    tokens: list[int]
    seen: int
    seen_heads: list[int]
    rounds: Iterator[tuple[int, int]]
    draft_length: DraftLength | None
    generator: torch.Generator | None
    drafts: int = 0
    started: bool = False
    new_tokens: int = 0
    step: tuple[int, int] = (0, 0)

    @property
    def request(self) -> Request:
        """As submitted."""
        return self.handle.request

    @property
    def unseen(self) -> int:
        """Verified tokens that the backbone has not computed."""
        return len(self.tokens) - self.seen


class Engine:
    """Runs the rounds of many requests on one model.

    Args:
        model: any causal LM of the family, on its device; its weights are copied into the layout of the device.
        max_rows: requests and idle sessions whose caches are held at once; more requests wait.
        max_length: tokens of a row, prompt and reply together; None: the model's limit, 8192 at most.
        speech: ids of the vocabulary's markers of speech; without them no request can restrict its rows.
        prompt_chunk: tokens of a prompt that are computed at once while others wait for their round; None: what
            suits the device.

    Raises:
        ValueError: the engine cannot run this model, or a number is out of range.
    """

    def __init__(
        self,
        model: Qwen2MTPForCausalLM,
        max_rows: int = 8,
        max_length: int | None = None,
        speech: AudioRows | None = None,
        prompt_chunk: int | None = None,
    ):
        limit = model.config.max_position_embeddings
        length = min(limit, 8192) if max_length is None else max_length
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: give 1 or more")
        if not 1 <= length <= limit:
            raise ValueError(f"max_length={length}: the model's positions end at {limit}")
        with torch.inference_mode():
            self._weights = Weights(model, speech)
            heads = self._weights.num_heads
            # The last round of a reply may run past its end.
            self._state = State(self._weights, max_rows, length + BURST + heads, draws=BURST + 2 * heads)
        self._max_length = length
        on_cpu = self._weights.device.type == "cpu"
        self._scheduler = Scheduler(prompt_chunk or (64 if on_cpu else 512), prompt_chunk or 512)
        self._rows: list[Running] = []
        self._idle: list[Session | None] = [None] * max_rows
        """Sessions without a request by the row that they hold; None for the rows in use and the free ones."""
        self._waiting: deque[Handle] = deque()
        self._rules = Rules.of(max_rows, self._weights.device)
        self._modes = Modes.of(max_rows, self._weights.device)
        self._graphs = Graphs(self._weights.device)
        self._shapes = Shapes(heads, self._state.length, exact=on_cpu)
        self._used: Tensor | None = None
        self._draft_probabilities: Tensor | None = None
        self._checks: Checks | None = None
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
            for running in self._rows:
                if running.session is session:
                    running.handle.cancelling = True
            if session.row is not None and not session.busy:
                self._idle[session.row] = None
                session.forget()

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
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._rows)

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
                for handle in [*self._waiting, *(running.handle for running in self._rows)]:
                    self.cancel(handle)

    def _loop(self) -> None:
        try:
            while True:
                with self._work:
                    while not self._stopping and not self._rows and not self._waiting:
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
        with self._work:
            self._end_unwanted()
            self._admit()
            turn = self._scheduler.next(self._rows)
            if turn is None:
                return False
            if turn.kind == "prompt":
                self._compute_prompt(turn.row, self._scheduler.chunk(self._rows))
            elif turn.kind == "first":
                self._run_round(turn.row, turn.row + 1)
            else:
                self._run_round(0, len(self._rows))
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
        Schedule.parse(request.schedule)

    def _admit(self) -> None:
        """Give waiting requests a row."""
        while self._waiting and len(self._rows) < self._state.rows:
            handle = self._waiting.popleft()
            request = handle.request
            session = request.session or self.session()
            session.busy = True
            row = self._take_row(session)
            length = session.common(request.prompt, request.embeds)
            # The last token of a prompt is always computed: the reply begins with its output.
            session.cut(min(length, len(request.prompt) - 1), self._weights.num_heads)
            sampling = request.sampling
            running = Running(
                handle,
                session,
                tokens=list(request.prompt),
                seen=session.seen,
                seen_heads=list(session.seen_heads),
                rounds=segments(Schedule.parse(request.schedule), self._weights.num_heads, BURST),
                draft_length=DraftLength(self._weights.num_heads, self._draft_cost())
                if request.lossless
                else None,
                generator=_generator(sampling.seed) if sampling.do_sample else None,
            )
            handle.stats.prompt_tokens, handle.stats.cached_tokens = len(running.tokens), running.seen
            self._state.tokens[row, : len(running.tokens)] = torch.tensor(running.tokens)
            self._state.set(row, len(running.tokens), running.seen, running.seen_heads)
            self._rules.set(row, sampling)
            self._modes.set(row, request)
            if request.sampling.repetition_penalty != 1:
                if self._used is None:
                    shape = (self._state.rows, self._weights.vocab_size)
                    self._used = torch.zeros(shape, dtype=torch.bool, device=self._weights.device)
                self._used[row] = False
                self._used[row, self._state.tokens[row, : len(running.tokens)]] = True
            if request.lossless and sampling.do_sample and self._draft_probabilities is None:
                shape3 = (self._state.rows, self._weights.num_heads, self._weights.vocab_size)
                self._draft_probabilities = torch.zeros(shape3, device=self._weights.device)
            if request.audio_rows == "auto":
                if self._checks is None:
                    self._checks = Checks.of(self._weights, self._state.rows)
                self._checks.tokens[row] = -1
                self._checks.disagreements[row] = 0
            self._rows.append(running)

    def _take_row(self, session: Session) -> int:
        """Bring a session's caches, or empty ones, to the first row that is not in use."""
        row = len(self._rows)
        if session.row is None:
            if (holder := self._idle[row]) is not None:
                free = [i for i in range(row + 1, self._state.rows) if self._idle[i] is None]
                if free:
                    self._move(holder, row, free[0])
                else:
                    oldest = min(
                        (idle for idle in self._idle if idle is not None), key=lambda idle: idle.used_at
                    )
                    place = oldest.row
                    oldest.forget()
                    assert place is not None
                    self._idle[place] = None
                    if place != row:
                        self._move(holder, row, place)
        elif session.row != row:
            other = self._idle[row]
            length = max(len(session.tokens), 0 if other is None else len(other.tokens))
            self._state.swap(session.row, row, length + 1)
            self._idle[session.row] = other
            if other is not None:
                other.row = session.row
        self._idle[row] = None
        session.row = row
        return row

    def _move(self, session: Session, source: int, target: int) -> None:
        self._state.swap(source, target, len(session.tokens) + 1)
        self._idle[source], self._idle[target] = None, session
        session.row = target

    @torch.inference_mode()
    def _end_unwanted(self) -> None:
        now = time.perf_counter()
        for running in list(self._rows):
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

    def _end(self, running: Running, reason: Reason) -> None:
        """Free a row; what a session may need again stays in it."""
        row, last = self._rows.index(running), len(self._rows) - 1
        if self._checks is not None and running.request.audio_rows == "auto":
            running.handle.stats.disagreements = int(self._checks.disagreements[row])
        session = running.session
        session.tokens, session.embeds = running.tokens, running.request.embeds
        session.seen, session.seen_heads = running.seen, running.seen_heads
        session.busy = False
        if row != last:
            moved = self._rows[last]
            length = max(len(moved.tokens) + moved.drafts, len(running.tokens))
            self._state.swap(row, last, length + 1)
            for tensor in self._row_tensors():
                tensor[[row, last]] = tensor[[last, row]]
            self._rows[row] = moved
            moved.session.row = row
        self._rows.pop()
        keep = running.request.session is session and not session.closed
        session.used_at = time.perf_counter()
        if keep:
            session.row = last
            self._idle[last] = session
        else:
            session.forget()
        self._finish_handle(running.handle, reason)

    def _row_tensors(self) -> list[Tensor]:
        """What belongs to requests, by row, besides the state."""
        tensors = [*self._rules.tensors(), *self._modes.tensors()]
        tensors += [each for each in (self._used, self._draft_probabilities) if each is not None]
        if self._checks is not None:
            tensors += [self._checks.hidden, self._checks.tokens, self._checks.disagreements]
        return tensors

    def _finish_handle(self, handle: Handle, reason: Reason) -> None:
        handle.stats.seconds = time.perf_counter() - handle.submitted
        handle.push(Finished(reason, handle.stats))
        self._work.notify_all()

    # -- rounds -----------------------------------------------------------------------------------------------

    def _compute_prompt(self, row: int, chunk: int) -> None:
        """Compute the next chunk of a prompt, but not its end; heads follow where they know what they read."""
        running = self._rows[row]
        first = running.seen
        last = min(first + chunk, len(running.tokens) - 1)
        embeds = running.request.embeds
        part = None if embeds is None else embeds[first:last].to(self._weights.embedding)
        heads = self._heads_in_use(running)
        prompt_pass(self._weights, self._state, row, first, last, part)
        running.seen = last
        self._catch_up(row, heads, last)

    def _heads_in_use(self, running: Running) -> int:
        if running.request.lossless:
            return self._weights.num_heads
        return min(Schedule.parse(running.request.schedule).longest_head_run, self._weights.num_heads)

    def _catch_up(self, row: int, heads: int, seen: int) -> None:
        """Run heads over positions that they lag behind, up to where all tokens that they read are verified."""
        running = self._rows[row]
        last = min(seen, len(running.tokens) - self._weights.num_heads)
        if not heads or last <= running.seen_heads[heads - 1]:
            return
        chunk = self._scheduler.chunk(self._rows)
        for first in range(running.seen_heads[heads - 1], last, chunk):
            heads_pass(self._weights, self._state, row, heads, first, min(first + chunk, last))
        running.seen_heads[:heads] = [last] * heads

    def _run_round(self, first: int, last: int) -> None:
        """Run a round of the rows ``first`` … ``last`` - 1, but for those whose prompt is not computed yet."""
        alone = last - first == 1
        members = [(row, self._rows[row]) for row in range(first, last) if alone or self._rows[row].started]
        for row, running in members:
            running.step = self._next_step(running)
            heads = running.step[1]
            if heads and running.seen - running.seen_heads[heads - 1] > LARGEST_LAG:
                self._catch_up(row, heads, running.seen)
        plan = self._plan(first, last, members)
        state, rows = self._state, plan.rows
        steps = [[0, 0] for _ in range(first, last)]
        for row, running in members:
            steps[row - first] = list(running.step)
        counts = torch.tensor(steps, device=self._weights.device)
        state.backbone_steps[rows], state.head_steps[rows] = counts[:, 0], counts[:, 1]
        self._draw(members)
        turn = Round(
            self._weights,
            state,
            plan,
            self._rules.of_rows(rows),
            self._modes.of_rows(rows),
            used=self._used[rows] if self._used is not None and plan.drawing.penalty else None,
            draft_probabilities=self._draft_probabilities[rows]
            if self._draft_probabilities is not None and plan.lossless and not plan.drawing.plain
            else None,
            checks=self._checks.of_rows(rows) if self._checks is not None and plan.check else None,
            prompt=self._prompt_end(members[0][1]) if alone and not members[0][1].started else None,
        )
        self._graphs.run(self._shapes.key("read", plan), turn.read)
        self._graphs.run(self._shapes.key("go_on", plan), turn.go_on)
        self._collect(first, last, members)

    def _next_step(self, running: Running) -> tuple[int, int]:
        if running.draft_length is None:
            return next(running.rounds)
        return 1, running.draft_length.best()

    def _plan(self, first: int, last: int, members: Sequence[tuple[int, Running]]) -> Plan:
        ends, widths, head_widths = [], [], []
        for _, running in members:
            known = len(running.tokens) + running.drafts
            passes, heads = running.step
            seen = known + passes - 1  # at the end of the backbone's passes, if all drafts are accepted
            ends.append(seen)
            widths.append(known - running.seen)
            if heads:
                head_widths.append(seen - running.seen_heads[heads - 1])
        requests = [running.request for _, running in members]
        lossless = any(request.lossless for request in requests)
        return Plan(
            first,
            last,
            width=self._shapes.width(max(widths)),
            head_width=self._shapes.head_width(max(head_widths, default=0)),
            length=self._shapes.length(max(ends)),
            backbone_steps=max(running.step[0] for _, running in members),
            head_steps=max(running.step[1] for _, running in members),
            together=len(members) == last - first and len({running.step for _, running in members}) == 1,
            exact=last - first == 1 and not lossless and self._shapes.exact,
            lossless=lossless,
            heads_speak=all(request.audio_rows == "on" for request in requests),
            speech=any(request.audio_rows != "off" for request in requests),
            check=any(request.audio_rows == "auto" and not request.lossless for request in requests),
            drawing=Drawing.of([request.sampling for request in requests]),
        )

    def _prompt_end(self, running: Running) -> Tensor | None:
        """Inputs of the last chunk of a prompt, (width, d), if they are not plain embeddings."""
        embeds = running.request.embeds
        return None if embeds is None else embeds[running.seen :].to(self._weights.embedding)

    def _draw(self, members: Sequence[tuple[int, Running]]) -> None:
        """Each member's own random numbers for one round."""
        uniforms = self._state.uniforms
        for row, running in members:
            if running.generator is not None:
                uniforms[row] = torch.rand(
                    uniforms.shape[1], generator=running.generator, dtype=torch.float64
                )

    def _collect(self, first: int, last: int, members: Sequence[tuple[int, Running]]) -> None:
        """Fetch a round's tokens from the device and hand them out."""
        state, device = self._state, self._weights.device
        rows = slice(first, last)
        starts = [len(running.tokens) for running in self._rows[first:last]]
        made = [max(sum(running.step), running.drafts + 1) for _, running in members]
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(max(made), device=device)
        columns.clamp_(max=state.tokens.shape[1] - 1)
        new = torch.cat(
            [(state.known[rows] - state.drafts[rows])[:, None], state.tokens[rows].gather(1, columns)], dim=1
        )
        fetched = new.tolist()
        ended: list[tuple[Running, Reason]] = []
        for row, running in members:
            known, *ids = fetched[row - first]
            start, (passes, heads) = starts[row - first], running.step
            ids = ids[: known - start]
            lossless = running.request.lossless
            # The backbone has not seen its own last token, nor what heads made of it.
            running.seen = known - 1 if lossless else start + passes - 1
            verified = max(running.seen - self._weights.num_heads, 0) if lossless else running.seen
            running.seen_heads[:heads] = [verified] * heads
            accepted = len(ids) - 1 if lossless else None
            if running.draft_length is not None:
                running.draft_length.update(running.drafts, len(ids) - 1)
                running.handle.stats.drafts += running.drafts
                running.handle.stats.accepted += len(ids) - 1
                running.drafts = heads
            if not running.started:
                running.started = True
            reason = self._take(running, ids, accepted)
            if reason is not None:
                ended.append((running, reason))
        for running, reason in ended:
            self._end(running, reason)

    def _take(self, running: Running, ids: list[int], accepted: int | None) -> Reason | None:
        """Add a round's tokens to a reply, up to where it ends. Returns why it ended, or None."""
        request, stats = running.request, running.handle.stats
        reason: Reason | None = None
        left = request.max_new_tokens - stats.new_tokens
        if len(ids) >= left:
            ids, reason = ids[:left], "length"
        stop = next((i for i, token in enumerate(ids) if token in request.stop_tokens), None)
        if stop is not None:
            ids, reason = ids[: stop + 1], "stop"
        running.tokens += ids
        stats.new_tokens += len(ids)
        stats.rounds += 1
        if stats.first_seconds is None:
            stats.first_seconds = time.perf_counter() - running.handle.submitted
        running.handle.push(Tokens(tuple(ids), accepted))
        return reason

    def _draft_cost(self) -> float:
        """A draft's share of the backbone's pass, by the bytes that both read."""
        weights = self._weights
        return weights.head_bytes / weights.backbone_bytes


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
