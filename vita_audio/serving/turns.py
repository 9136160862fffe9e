"""The history of a realtime conversation: items that can be added, cut and deleted, as token ids.

Items are rendered once, when they come. A reply's request is their ids in order, so the engine's caches, which keep
the common beginning, hold all that did not change. :class:`~vita_audio.inference.session.ChatSession` does the same for
whole turns; here an item can also be removed, and speech comes encoded.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from vita_audio.audio import AudioLike
from vita_audio.chat import ChatTokens, Example, Message, build_prompt
from vita_audio.constants import VOICE_PROMPT
from vita_audio.inference import (
    AudioChunk,
    EngineBackend,
    Event,
    GenerationOptions,
    Request,
    SpeechPipeline,
    prompts,
)
from vita_audio.inference.replies import Sound
from vita_audio.inference.session import heard_part, joined
from vita_audio.serving.listening import Speech

Role = Literal["system", "user", "assistant"]


@dataclass
class Item:
    """One item of the history.

    Attributes:
        id: for clients.
        role: who speaks.
        prompt: its rendered turn; for a reply, only the opening of the turn.
        reply: ids of a generated reply; None for other items.
        text: what is written or was said.
        seconds: duration of its sound.
        speech: the user's speech.
        begun: ``time.perf_counter()`` when the first sound of the reply was sent.
        cut_ms: the reply was cut after this many ms of its sound.
    """

    id: str
    role: Role
    prompt: Example
    reply: list[int] | None = None
    text: str = ""
    seconds: float = 0.0
    speech: Speech | None = None
    begun: float | None = None
    cut_ms: int | None = None

    @property
    def played_seconds(self) -> float:
        """Upper bound of what was heard of a reply by now: a player starts with the first sound and does not hurry."""
        return 0.0 if self.begun is None else min(self.seconds, time.perf_counter() - self.begun)

    @property
    def playing(self) -> bool:
        """Whether a player may still have sound of it."""
        return (
            self.begun is not None and self.cut_ms is None and time.perf_counter() - self.begun < self.seconds
        )


@dataclass
class Dialogue:
    """The history of one connection. Close it to free its caches.

    Attributes:
        pipeline: whose model answers.
        items: in order.
    """

    pipeline: SpeechPipeline
    items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tokens = ChatTokens.of(self.pipeline.tokenizer)
        self._opening = Example()
        backend = self.pipeline.backend
        self._engine = backend.engine if isinstance(backend, EngineBackend) else None
        self._caches = None if self._engine is None else self._engine.session()

    def begin_with(self, system: str | None, voice: AudioLike | None) -> None:
        """Set what stands before all items: a system message, or a voice prompt, which takes its place."""
        if voice is not None:
            self._opening = self._render(Message.of("system", VOICE_PROMPT), voice)
        else:
            self._opening = Example() if system is None else self._render(Message("system", (system,)))

    def add(
        self, item_id: str, role: Role, text: str, speech: Speech | None, after: str | None = None
    ) -> Item:
        """Add an item with text, speech or both.

        Raises:
            ValueError: the item cannot be rendered.
            KeyError: there is no item ``after``.
        """
        place = len(self.items) if after is None else self.index(after) + 1
        texts = (text,) if speech is None else (f"{text}\n" if text else "", "")
        prompt = self._render(Message(role, texts), speech)
        item = Item(item_id, role, prompt, text=text, speech=speech)
        item.seconds = 0.0 if speech is None else speech.seconds
        self.items.insert(place, item)
        return item

    def add_reply(self, item_id: str) -> Item:
        """Open a reply at the end; :meth:`stream` fills it."""
        opening = Example(input_ids=list(self._tokens.turn_openings["assistant"]))
        item = Item(item_id, "assistant", opening, reply=[])
        self.items.append(item)
        return item

    def index(self, item_id: str) -> int:
        """The place of an item; -1 for ``root``, which stands before all.

        Raises:
            KeyError: there is no such item.
        """
        if item_id == "root":
            return -1
        for index, item in enumerate(self.items):
            if item.id == item_id:
                return index
        raise KeyError(item_id)

    def cut(self, item: Item, audio_end_ms: int) -> None:
        """Forget what of a reply comes after ``audio_end_ms`` of its sound."""
        if item.reply is None:
            return
        codes = int(audio_end_ms / 1000 * self.pipeline.codec.frame_rate)
        item.reply[:] = heard_part(item.reply, codes, self._tokens)
        item.cut_ms = audio_end_ms
        item.seconds = min(item.seconds, audio_end_ms / 1000)

    def request(self, item: Item, options: GenerationOptions, sound: Sound) -> Request:
        """The request for the reply that ``item`` opens; the items before it are its history."""
        prompt = self._opening
        for each in self.items[: self.items.index(item)]:
            prompt = joined(prompt, each.prompt)
            if each.reply is not None:
                prompt = joined(prompt, Example(input_ids=[*each.reply, *self._tokens.turn_end]))
        prompt = joined(prompt, item.prompt)
        return Request(
            prompt, options, sound, asked=time.perf_counter(), session=self._caches, token_ids=item.reply
        )

    def stream(self, item: Item, request: Request) -> Generator[Event, None, None]:
        """The reply that ``item`` opens, as events; its text and sound are recorded in the item as they are taken."""
        rate = self.pipeline.codec.sample_rate
        with closing(self.pipeline.backend.stream(request)) as events:
            for event in events:
                if isinstance(event, AudioChunk):
                    item.seconds += len(event.samples) / rate
                yield event

    def transcription(self, speech: Speech) -> Example:
        """The prompt that asks for the words of a turn."""
        message = prompts.transcription(b"").messages[0]
        codec: Any = _Encoded(self.pipeline.codec)
        clip: Any = speech
        return build_prompt([message], [clip], self.pipeline.tokenizer, codec)

    def close(self) -> None:
        """Free the caches. May be called twice."""
        if self._engine is not None and self._caches is not None:
            self._engine.close_session(self._caches)

    def _render(self, message: Message, *clips: Any) -> Example:
        codec: Any = _Encoded(self.pipeline.codec)
        given = [clip for clip in clips if clip is not None]
        return build_prompt([message], given, self.pipeline.tokenizer, codec, add_generation_prompt=False)


class _Encoded:
    """A codec that takes encoded speech for what it is, and encodes everything else."""

    def __init__(self, codec: Any):
        self._codec = codec
        self.kind = codec.kind

    def encode(self, audio: Any) -> list[int]:
        """See :meth:`~vita_audio.audio.AudioTokenizer.encode`."""
        content: Any = audio.content if isinstance(audio, Speech) else self._codec.encode(audio)
        return list(content)

    def features(self, audio: Any) -> Tensor:
        """See :meth:`~vita_audio.audio.AudioTokenizer.features`."""
        content: Any = audio.content if isinstance(audio, Speech) else self._codec.features(audio)
        features: Tensor = content
        return features
