"""Which request or session holds which row of the state, and what belongs to a request by row.

Rows in use are always the first ones, so that a round runs over a range of rows. A row that ends gives its place to the
last one in use. Sessions without a request hold rows behind them, until a request needs their row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from vita_audio.engine.drafting import DraftLength
from vita_audio.engine.requests import Handle, Request
from vita_audio.engine.rounds import BURST, Checks, Modes
from vita_audio.engine.sampling import Rules
from vita_audio.engine.scheduler import segments
from vita_audio.engine.sessions import Session
from vita_audio.engine.state import State
from vita_audio.engine.weights import Weights
from vita_audio.models.schedule import Schedule


@dataclass(eq=False)
class Running:
    """A request that has a row.

    Attributes:
        session: the request's, or one that ends with it.
        tokens: of prompt and reply, without unverified drafts.
        seen: positions that the backbone has computed. seen_heads: that each head has, the last perhaps from drafts.
        rounds: what is left of its schedule.
        draft_length: of a lossless request.
        generator: of a sampled request.
        drafts: unverified tokens that follow ``tokens`` in the state.
        stops: ids that end the reply.
        started: the first round has run.
        step: passes of backbone and heads in the round that runs.
    """

    handle: Handle
    session: Session
    tokens: list[int]
    seen: int
    seen_heads: list[int]
    rounds: Iterator[tuple[int, int]]
    draft_length: DraftLength | None
    generator: torch.Generator | None
    stops: tuple[int, ...]
    drafts: int = 0
    started: bool = False
    step: tuple[int, int] = (0, 0)

    @property
    def request(self) -> Request:
        """As submitted."""
        return self.handle.request

    @property
    def unseen(self) -> int:
        """Verified tokens that the backbone has not computed."""
        return len(self.tokens) - self.seen

    @property
    def drafts_wanted(self) -> int:
        """How many tokens a lossless request drafts next."""
        assert self.draft_length is not None
        if self.request.sampling.do_sample:
            # The number of drafts decides which random numbers are used for what, and company how far heads lag.
            return self.draft_length.best()
        return self.draft_length.best([self.seen - seen for seen in self.seen_heads])

    @property
    def tokens_left(self) -> int:
        """How many more tokens the reply may have."""
        return self.request.max_new_tokens - self.handle.stats.new_tokens

    @property
    def joins(self) -> bool:
        """Whether its first round can run together with others': its prompt is plain tokens."""
        return self.request.embeds is None


class RowTable:
    """The rows of a state.

    Attributes:
        running: requests by row; the rows in use.
        rules, modes: options of each row, on the device.
        used, draft_probabilities, checks: see :class:`~vita_audio.engine.rounds.Round`; made when a request first needs
            them.
    """

    def __init__(self, weights: Weights, state: State):
        self._weights, self._state = weights, state
        self.running: list[Running] = []
        self.rules = Rules.of(state.rows, weights.device)
        self.modes = Modes.of(state.rows, weights.device)
        self.used: Tensor | None = None
        self.draft_probabilities: Tensor | None = None
        self.checks: Checks | None = None
        self._idle: list[Session | None] = [None] * state.rows
        """Sessions without a request by row; None for the rows in use and the free ones."""

    @property
    def is_full(self) -> bool:
        """Whether every row is in use."""
        return len(self.running) == self._state.rows

    @property
    def num_idle(self) -> int:
        """Sessions that hold a row without a request."""
        return sum(session is not None for session in self._idle)

    def drop(self, session: Session) -> None:
        """Free the row of a session without a request."""
        if session.row is not None:
            self._idle[session.row] = None
        session.forget()

    def start(self, handle: Handle, session: Session) -> None:
        """Give a request the first row that is not in use."""
        request, weights, state = handle.request, self._weights, self._state
        row = self._take_row(session)
        length = session.common(request.prompt, request.embeds)
        # The last token of a prompt is always computed: the reply begins with its output.
        session.cut(min(length, len(request.prompt) - 1), weights.num_heads)
        drafts = DraftLength(weights.num_heads, weights.round_cost) if request.lossless else None
        running = Running(
            handle,
            session,
            tokens=list(request.prompt),
            seen=session.seen,
            seen_heads=list(session.seen_heads),
            rounds=segments(Schedule.parse(request.schedule), weights.num_heads, BURST),
            draft_length=drafts,
            stops=tuple(map(index, request.stop_tokens)),
            generator=_generator(request.sampling.seed) if request.sampling.do_sample else None,
        )
        handle.stats.prompt_tokens, handle.stats.cached_tokens = len(running.tokens), running.seen
        state.tokens[row, : len(running.tokens)] = torch.tensor(running.tokens)
        state.set(row, len(running.tokens), running.seen, running.seen_heads)
        self.rules.set(row, request.sampling)
        self.modes.set(row, request)
        self._prepare(row, request)
        self.running.append(running)

    def end(self, running: Running) -> None:
        """Free a request's row; what its session may need again stays in it."""
        row, last = self.running.index(running), len(self.running) - 1
        if self.checks is not None and running.request.audio_rows == "auto":
            running.handle.stats.disagreements = int(self.checks.disagreements[row])
        session = running.session
        session.tokens, session.embeds = running.tokens, running.request.embeds
        session.seen, session.seen_heads = running.seen, running.seen_heads
        session.busy, session.used_at = False, time.perf_counter()
        if row != last:
            moved = self.running[last]
            length = max(len(moved.tokens) + moved.drafts, len(running.tokens))
            self._state.swap(row, last, length + 1)
            for tensor in self._tensors():
                tensor[[row, last]] = tensor[[last, row]]
            self.running[row] = moved
            moved.session.row = row
        self.running.pop()
        if running.request.session is session and not session.closed:
            session.row = last
            self._idle[last] = session
        else:
            session.forget()

    def _prepare(self, row: int, request: Request) -> None:
        """Make and clear what a request's options need."""
        weights, state = self._weights, self._state
        if request.sampling.repetition_penalty != 1:
            if self.used is None:
                shape = (state.rows, weights.vocab_size)
                self.used = torch.zeros(shape, dtype=torch.bool, device=weights.device)
            self.used[row] = False
            self.used[row, state.tokens[row, : len(request.prompt)]] = True
        if request.lossless and request.sampling.do_sample and self.draft_probabilities is None:
            drafts = (state.rows, weights.num_heads, weights.vocab_size)
            self.draft_probabilities = torch.zeros(drafts, device=weights.device)
        if request.audio_rows == "auto" and self.checks is None:
            self.checks = Checks.of(weights, state.rows)
        if self.checks is not None:
            self.checks.tokens[row] = -1
            self.checks.disagreements[row] = 0

    def _tensors(self) -> Iterator[Tensor]:
        """What belongs to requests, by row, besides the state."""
        yield from self.rules.tensors()
        yield from self.modes.tensors()
        yield from (each for each in (self.used, self.draft_probabilities) if each is not None)
        if self.checks is not None:
            yield from (self.checks.hidden, self.checks.tokens, self.checks.disagreements)

    def _take_row(self, session: Session) -> int:
        """Bring a session's caches, or empty ones, to the first row that is not in use."""
        row = len(self.running)
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


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
