"""A conversation over several turns: only what is new is computed, and a reply may be interrupted.

    with pipeline.session() as session:
        for event in session.stream(prompts.speech_to_speech("question.wav")):
            ...
        session.interrupt(heard_seconds=1.4)     # the listener spoke: forget what was not heard
        for event in session.stream(prompts.chat("say that again")):
            ...

The history is kept as token ids: the model reads its earlier replies exactly as it wrote them. Its caches stay with the
engine between the turns; the reference backend computes the whole history again.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from vita_audio.chat import ChatTokens, Conversation, Example, Message
from vita_audio.inference.engine_backend import EngineBackend
from vita_audio.inference.options import AUTO_SYSTEM, CHECKPOINT_OPTIONS, GenerationOptions
from vita_audio.inference.replies import Event, Reply, Request

if TYPE_CHECKING:
    from vita_audio.inference.pipeline import SpeechPipeline


class ChatSession:
    """A conversation. Close it, or use it as a context, to free its caches.

    Args:
        pipeline: whose model answers.
        system: system message of the conversation, see :func:`~vita_audio.inference.options.system_message`.
    """

    def __init__(self, pipeline: SpeechPipeline, system: str | None = AUTO_SYSTEM):
        self._pipeline = pipeline
        self._tokens = ChatTokens.of(pipeline.tokenizer)
        self._system = pipeline.system_message(system)
        self._history = Example()
        self._asked = Example()
        self._reply: list[int] = []
        backend = pipeline.backend
        self._engine = backend.engine if isinstance(backend, EngineBackend) else None
        self._caches = None if self._engine is None else self._engine.session()

    def stream(
        self, turn: Conversation, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Generator[Event, None, None]:
        """Answer the next turn as a stream, as :meth:`SpeechPipeline.stream` does.

        Closing the iterator ends generation at once. What was made of the reply stays in the history unless
        :meth:`interrupt` shortens it.

        Args:
            turn: the user's new messages. A system message is allowed in the first turn only.

        Raises:
            ValueError: the session is closed, or the conversation is too long for the model.
        """
        request = self._request(turn, options)
        with closing(self._pipeline.backend.stream(request)) as events:
            for event in events:
                yield replace(event, system=self._system) if isinstance(event, Reply) else event

    def reply(self, turn: Conversation, options: GenerationOptions = CHECKPOINT_OPTIONS) -> Reply:
        """Answer the next turn; see :meth:`stream`."""
        return next(event for event in self.stream(turn, options) if isinstance(event, Reply))

    def interrupt(self, heard_codes: int | None = None, heard_seconds: float | None = None) -> None:
        """Forget the part of the last reply that was not heard.

        The reply ends with the last code that was heard, and with the text before it. Close the stream first.

        Args:
            heard_codes: speech codes of the reply that were heard, or instead of them
            heard_seconds: seconds of its sound.

        Raises:
            ValueError: not exactly one of the two was given.
        """
        if (heard_codes is None) == (heard_seconds is None):
            raise ValueError("interrupt: give heard_codes or heard_seconds")
        if heard_codes is None:
            heard_codes = int((heard_seconds or 0.0) * self._pipeline.codec.frame_rate)
        self._reply[:] = heard_part(self._reply, heard_codes, self._tokens)

    @property
    def history(self) -> list[int]:
        """Token ids of the conversation so far, the last reply included."""
        return self._so_far().input_ids

    def close(self) -> None:
        """Free the caches. May be called twice."""
        if self._engine is not None and self._caches is not None:
            self._engine.close_session(self._caches)

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, turn: Conversation, options: GenerationOptions) -> Request:
        asked = time.perf_counter()
        past = self._so_far()
        first = turn.messages[0]
        if past.input_ids and first.role == "system":
            raise ValueError("a system message can only begin a conversation; start a new session")
        if first.role == "system":
            self._system = str(first.content)
        elif not past.input_ids and self._system is not None:
            turn = Conversation((Message("system", (self._system,)), *turn.messages), turn.audios)
        self._history = past
        self._asked = self._pipeline.prompt(turn)
        self._reply = []
        return Request(
            prompt=joined(past, self._asked),
            options=options,
            asked=asked,
            session=self._caches,
            token_ids=self._reply,
        )

    def _so_far(self) -> Example:
        """History, question and reply of the last turn, closed."""
        if not self._asked.input_ids:
            return self._history
        past = joined(self._history, self._asked)
        return replace(past, input_ids=[*past.input_ids, *self._reply, *self._tokens.turn_end])


def joined(past: Example, new: Example) -> Example:
    """Two parts of a conversation as one prompt."""
    shift = len(past.input_ids)
    return Example(
        input_ids=[*past.input_ids, *new.input_ids],
        features=[*past.features, *new.features],
        feature_positions=[
            *past.feature_positions,
            *([place + shift for place in places] for places in new.feature_positions),
        ],
    )


def heard_part(ids: Sequence[int], heard_codes: int, tokens: ChatTokens) -> list[int]:
    """The tokens of a reply up to the last code that was heard; speech that it leaves open is closed.

    Args:
        ids: of the reply.
        heard_codes: number of its speech codes that were heard.
    """
    inside, heard, end_of_heard, inside_there = False, 0, 0, False
    for place, token in enumerate(ids):
        if 0 <= token - tokens.first_code < tokens.codebook_size:
            if heard == heard_codes:
                break
            heard += 1
            end_of_heard, inside_there = place + 1, inside
        elif token in (tokens.begin, tokens.end):
            inside = token == tokens.begin
    kept = list(ids[:end_of_heard])
    return [*kept, tokens.end] if inside_there else kept
