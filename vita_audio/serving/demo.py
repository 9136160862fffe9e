"""Gradio pages for files: ask with history, transcribe, read aloud, in another's voice too. Needs the extra ``demo``.

    python tools/web_demo.py --gradio

The pages are an API as well: ``gradio_client.Client(address).predict("good morning", api_name="/speak")``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from vita_audio.audio import AudioError, AudioLike
from vita_audio.audio.sandbox import ClipProcess
from vita_audio.chat import Conversation, Message
from vita_audio.extras import needs_extra
from vita_audio.inference import GenerationOptions, Reply, SpeechPipeline, prompts
from vita_audio.inference.session import ChatSession
from vita_audio.models.schedule import SCHEDULES
from vita_audio.serving.config import ServeOptions
from vita_audio.serving.sounds import to_pcm

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
with needs_extra("demo"):
    import gradio
    import numpy as np
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
    from starlette.types import ASGIApp, Receive, Scope, Send

CHECKPOINT = "checkpoint's choice"
_ADDRESSES = ("http://", "https://")

Sound = tuple[int, Any] | None
"""Sample rate in Hz and 16-bit samples, as Gradio has them."""
Task = TypeVar("Task", bound=Callable[..., Any])


@contextmanager
def open_demo(pipeline: SpeechPipeline, options: ServeOptions, name: str) -> Iterator[str]:
    """Serve the pages while the context is open. Yields their address.

    Args:
        pipeline: answers.
        options: address and limits; those of keys, origins and connections are not Gradio's.
        name: of the model, for the title.

    Raises:
        OSError: the address cannot be used.
    """
    clips = ClipProcess(options.audio_seconds)
    clips.start()
    demo = _pages(_Tasks(pipeline, options, clips), options, name)
    try:
        _, address, _ = demo.launch(
            server_name=options.host, server_port=options.port or None, prevent_thread_lock=True, quiet=True,
            share=False, max_file_size=options.body_bytes, show_error=True,
            app_kwargs={"middleware": [Middleware(_NoAddresses)]},
        )  # fmt: skip
        yield address
    finally:
        demo.close(verbose=False)
        clips.close()


class _NoAddresses:
    """Refuses the requests with which Gradio fetches what stands at any public address."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path", "").partition("/file=")[2].startswith(_ADDRESSES):
            refusal = PlainTextResponse("no address of a client is opened", 403)
            await refusal(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _clip_input(label: str) -> gradio.Audio:
    """An input for a clip. Gradio's own also fetches a file from any public address that a client names."""
    clip: Any = gradio.Audio(label=label, sources=["microphone", "upload"], type="filepath")
    take = clip.async_move_resource_to_block_cache

    async def take_upload(file: str | Path | None) -> str | None:
        if str(file).startswith(_ADDRESSES):
            raise gradio.Error("upload the clip; no address of a client is opened", print_exception=False)
        return await take(file)

    # A subclass would be a new kind of component, for which Gradio writes a file beside this one.
    clip.async_move_resource_to_block_cache = take_upload
    return clip


def _refusals(task: Task) -> Task:
    """Show what cannot be used as one line on the page."""

    @wraps(task)
    def run(*arguments: Any) -> Any:
        try:
            return task(*arguments)
        except (AudioError, ValueError) as error:
            raise gradio.Error(str(error).splitlines()[0], print_exception=False) from error

    return run  # type: ignore[return-value]


@dataclass
class _Talk:
    """A conversation: what the model remembers, and what the page shows."""

    session: ChatSession
    shown: list[Any] = field(default_factory=list)


class _Tasks:
    """What the buttons do."""

    def __init__(self, pipeline: SpeechPipeline, options: ServeOptions, clips: ClipProcess):
        self._pipeline = pipeline
        self._options = options
        self._clips = clips

    @_refusals
    def talk(
        self, sound: str | None, text: str, mode: str, talk: _Talk | None
    ) -> tuple[list[Any], Sound, None, str, _Talk]:
        """The next turn of a conversation: a file, a text, or both."""
        if sound is None and not text.strip():
            raise ValueError("record, upload or type a question")
        texts = (self._checked(text),) if sound is None else (f"{self._checked(text)}\n" if text else "", "")
        audios: tuple[AudioLike, ...] = () if sound is None else (self._clip(sound),)
        talk = talk or _Talk(self._pipeline.session())
        reply = talk.session.reply(Conversation((Message("user", texts),), audios), self._how(mode))
        asked = [content for content in (sound and {"path": sound}, text) if content]
        talk.shown += [{"role": "user", "content": content} for content in asked]
        talk.shown.append({"role": "assistant", "content": reply.text})
        return talk.shown, _sound(reply), None, "", talk

    @_refusals
    def transcribe(self, sound: str | None, mode: str) -> str:
        """Speech to text."""
        return self._reply(prompts.transcription(self._clip(sound)), mode).text.strip()

    @_refusals
    def speak(self, text: str, mode: str) -> Sound:
        """Text to speech."""
        return self._read(prompts.synthesis(self._checked(text)), mode)

    @_refusals
    def clone(self, text: str, voice: str | None, mode: str) -> Sound:
        """Text to speech in the voice of a clip."""
        return self._read(prompts.synthesis(self._checked(text), self._clip(voice)), mode)

    def _read(self, conversation: Conversation, mode: str) -> Sound:
        sound = _sound(self._reply(conversation, mode))
        if sound is None:
            raise ValueError("the model did not speak")
        return sound

    def _reply(self, conversation: Conversation, mode: str) -> Reply:
        return self._pipeline.reply(conversation, self._how(mode))

    def _how(self, mode: str) -> GenerationOptions:
        chosen = None if mode == CHECKPOINT else mode
        return GenerationOptions(mode=chosen, max_new_tokens=self._options.new_tokens)

    def _checked(self, text: str) -> str:
        if len(text) > self._options.text_characters:
            raise ValueError(f"the text has more than {self._options.text_characters} characters")
        return text

    def _clip(self, file: str | None) -> AudioLike:
        """An upload, decoded in a process of its own. The file is Gradio's copy, never a path of the client's."""
        if file is None:
            raise ValueError("record or upload a clip")
        return self._clips.decode(Path(file).read_bytes())


def _sound(reply: Reply) -> Sound:
    if reply.waveform is None:
        return None
    return reply.sample_rate, np.frombuffer(to_pcm(reply.waveform), "<i2")


def _close(talk: _Talk | None) -> None:
    if talk is not None:
        talk.session.close()


def _begin_again(talk: _Talk | None) -> tuple[list[Any], None]:
    _close(talk)
    return [], None


def _pages(tasks: _Tasks, options: ServeOptions, name: str) -> gradio.Blocks:
    modes = [CHECKPOINT, *SCHEDULES]
    with gradio.Blocks(title=f"VITA-Audio: {name}", analytics_enabled=False) as demo:
        gradio.Markdown(f"# VITA-Audio: {name}")
        mode = gradio.Dropdown(modes, value=modes[0], label="Mode")
        with gradio.Tab("Ask"):
            talk = gradio.State(None, time_to_live=options.session_seconds, delete_callback=_close)
            history = gradio.Chatbot(label="Conversation")
            answer = gradio.Audio(label="Answer", autoplay=True, interactive=False)
            question = _clip_input("Question")
            typed = gradio.Textbox(label="… or a typed one", max_length=options.text_characters)
            given = [history, answer, question, typed, talk]
            gradio.Button("Ask", variant="primary").click(
                tasks.talk, [question, typed, mode, talk], given, api_name="talk"
            )
            gradio.Button("Begin again").click(_begin_again, [talk], [history, talk], api_name="begin_again")
        with gradio.Tab("Transcribe"):
            clip = _clip_input("Speech")
            words = gradio.Textbox(label="Words")
            gradio.Button("Transcribe", variant="primary").click(
                tasks.transcribe, [clip, mode], words, api_name="transcribe"
            )
        with gradio.Tab("Read aloud"):
            text = gradio.Textbox(label="Text", max_length=options.text_characters)
            speech = gradio.Audio(label="Speech", autoplay=True, interactive=False)
            gradio.Button("Read", variant="primary").click(
                tasks.speak, [text, mode], speech, api_name="speak"
            )
        with gradio.Tab("Clone a voice"):
            text = gradio.Textbox(label="Text", max_length=options.text_characters)
            voice = _clip_input("Voice")
            speech = gradio.Audio(label="Speech", autoplay=True, interactive=False)
            gradio.Button("Read", variant="primary").click(
                tasks.clone, [text, voice, mode], speech, api_name="clone"
            )
    demo.queue(max_size=options.queue or 1, default_concurrency_limit=options.slots)
    return demo
