"""What the engine is asked, and what it answers. No torch here but for a prompt's embeddings."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from vita_audio.models.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from vita_audio.engine.engine import Engine
    from vita_audio.engine.sessions import Session

AudioRowsMode = Literal["auto", "on", "off"]
"""Which rows of the vocabulary are read; see :class:`Request`."""

Reason = Literal["stop", "length", "cancelled", "deadline"]
"""Why a reply ended."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature, top_k, top_p: shape of the distribution; ``top_k=0`` keeps all tokens.
        repetition_penalty: above 1 discourages tokens of prompt and reply.
        seed: seed of the request's own draws; None: a new one for each request.

    Raises:
        ValueError: a value is out of range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: give a number above 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: give 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a share above 0 and up to 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: give a number above 0")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken, without a repetition penalty."""
        return not self.do_sample and self.repetition_penalty == 1


GREEDY = Sampling()
"""The most likely token at every step."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: token ids; with a session, of the whole conversation so far.
        schedule: who makes each token, see :class:`~vita_audio.models.schedule.Schedule`. A lossless request has
            none: the heads draft, and the backbone decides.
        sampling: how tokens are chosen.
        lossless: the reply is the backbone's alone (Vanilla's), token for token, or in distribution when sampling.
        audio_rows: read only the vocabulary's rows of speech where they suffice. ``off``: never. ``auto``: between
            the markers of speech. ``on``: there, and for every token from a head. See docs/engine.md.
        max_new_tokens: longest reply.
        stop_tokens: ids that end the reply. The one that did is its last token.
        embeds: (time, d), the backbone's inputs where the prompt is not plain embeddings of its ids.
        session: keeps the caches for the next request of the same conversation.
        timeout: seconds after which the reply ends where it is; None: no limit.
    """

    prompt: Sequence[int]
    schedule: Schedule | Sequence[int] | str = "boost"
    sampling: Sampling = GREEDY
    lossless: bool = False
    audio_rows: AudioRowsMode = "off"
    max_new_tokens: int = 1024
    stop_tokens: Sequence[int] = ()
    embeds: Tensor | None = None
    session: Session | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Tokens:
    """The ids that one round added to a reply.

    Attributes:
        ids: in order, one or more.
        accepted: drafts that the backbone confirmed; None if the request is not lossless.
    """

    ids: tuple[int, ...]
    accepted: int | None = None


@dataclass(frozen=True)
class Finished:
    """The end of a reply; its last event.

    Attributes:
        reason: ``stop``: a stop token, ``length``: max_new_tokens, ``cancelled`` or ``deadline``.
        stats: what the reply took.
    """

    reason: Reason
    stats: Stats


@dataclass
class Stats:
    """What a reply took.

    Attributes:
        prompt_tokens: tokens of the prompt; ``cached_tokens`` of them were in the session's cache.
        new_tokens: tokens of the reply.
        rounds: rounds that the request took part in.
        drafts, accepted: tokens drafted and confirmed, in lossless requests.
        disagreements: tokens taken from the rows of speech that all rows would have changed (``auto`` only).
        first_seconds: from submission to the end of the first round.
        seconds: from submission to the end.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    drafts: int = 0
    accepted: int = 0
    disagreements: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0


Event = Tokens | Finished


@dataclass(eq=False)
class Handle:
    """A submitted request; iterate over it for its events.

    Iterating runs the engine's rounds in this thread unless the engine runs in a thread of its own.
    """

    request: Request
    engine: Engine
    submitted: float = field(default_factory=time.perf_counter)
    stats: Stats = field(default_factory=Stats)
    finished: Finished | None = None
    cancelling: bool = False
    _events: deque[Event] = field(default_factory=deque)

    def cancel(self) -> None:
        """End the reply. No later round makes a token for it; its row is free after the round that runs now."""
        self.engine.cancel(self)

    def push(self, event: Event) -> None:
        """Called by the engine."""
        if isinstance(event, Finished):
            self.finished = event
        self._events.append(event)

    @property
    def has_events(self) -> bool:
        """Whether an event is ready."""
        return bool(self._events)

    def pop(self) -> Event | None:
        """The next event that is ready, or None."""
        return self._events.popleft() if self._events else None

    def __iter__(self) -> Generator[Event, None, None]:
        """Events as rounds end; the last one is :class:`Finished`. Leaving the iteration early cancels."""
        try:
            while True:
                event = self.pop()
                if event is None:
                    self.engine.wait(self)
                    continue
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            if self.finished is None:
                self.cancel()

    def tokens(self) -> list[int]:
        """All ids of the reply, the stop token included."""
        return [token for event in self if isinstance(event, Tokens) for token in event.ids]
