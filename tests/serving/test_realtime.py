"""``/v1/realtime`` through the official client: turns, speech detection, interruption, history."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import websockets.exceptions
import websockets.sync.client
from openai.types import realtime as kinds
from pydantic import TypeAdapter
from waiting import eventually

from vita_audio.audio import load_audio
from vita_audio.inference import GenerationOptions, Request
from vita_audio.inference.session import heard_part
from vita_audio.serving import realtime, turns
from vita_audio.serving.sounds import RATE, to_pcm

CUTS = int(os.environ.get("CUTS", "8"))
SERVER_EVENT = TypeAdapter(kinds.RealtimeServerEvent)


class Talk:
    """A connection of the official client."""

    def __init__(self, connection):
        self.connection = connection
        self.events: list = []

    def next(self):
        event = self.connection.recv()
        SERVER_EVENT.validate_python(event.model_dump(exclude_unset=True))
        self.events.append(event)
        return event

    def until(self, kind: str):
        while (event := self.next()).type != kind:
            assert event.type != "error" or kind == "error", event
        return event

    def update(self, **session):
        self.connection.session.update(session={"type": "realtime", **session})
        return self.until("session.updated").session

    def say(self, pcm: bytes, piece: int = RATE // 25 * 2) -> None:
        for start in range(0, len(pcm), piece):
            audio = base64.b64encode(pcm[start : start + piece]).decode()
            self.connection.input_audio_buffer.append(audio=audio)

    def ask(self, pcm: bytes) -> None:
        self.say(pcm)
        self.connection.input_audio_buffer.commit()
        self.connection.response.create()

    def type(self, text: str):
        content = [{"type": "input_text", "text": text}]
        self.connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
        return self.until("conversation.item.done").item

    def answer(self) -> tuple[str, bytes]:
        """Transcript and sound of the next reply."""
        start = len(self.events)
        self.until("response.done")
        sound = [each.delta for each in self.events[start:] if each.type == "response.output_audio.delta"]
        text = [
            each.delta
            for each in self.events[start:]
            if each.type == "response.output_audio_transcript.delta"
        ]
        return "".join(text), b"".join(map(base64.b64decode, sound))


@contextmanager
def talking(running, **session) -> Iterator[Talk]:
    with running.client().realtime.connect(model="tiny") as connection:
        talk = Talk(connection)
        talk.until("session.created")
        talk.update(**{"temperature": 0, **session})
        yield talk


BY_HAND = {"audio": {"input": {"turn_detection": None}}}


@pytest.fixture(scope="module")
def question(tiny_world) -> bytes:
    return to_pcm(load_audio(tiny_world.audio("question.wav"), RATE)[0])


@pytest.fixture
def dialogues(monkeypatch) -> list:
    """The histories of the connections that are opened in a test."""
    made = []

    def make(pipeline):
        made.append(turns.Dialogue(pipeline))
        return made[-1]

    monkeypatch.setattr(realtime, "Dialogue", make)
    return made


def test_a_spoken_turn_is_answered_aloud(running, question):
    with talking(running, **BY_HAND) as talk:
        talk.ask(question)
        text, sound = talk.answer()
        assert text.strip() == "blue"
        assert len(sound) > RATE
        order = [event.type for event in talk.events]
        for before, after in (
            ("input_audio_buffer.committed", "conversation.item.done"),
            ("response.created", "response.output_item.added"),
            ("response.content_part.added", "response.output_audio.delta"),
            ("response.output_audio.delta", "response.output_audio.done"),
            ("response.content_part.done", "response.output_item.done"),
        ):
            assert order.index(before) < order.index(after)
        done = talk.events[-1].response
        assert done.status == "completed"
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens


def test_a_reply_does_not_depend_on_how_speech_is_cut_into_pieces(running, question):
    answers = []
    for piece in (480, 4800, len(question)):
        with talking(running, **BY_HAND) as talk:
            talk.say(question, piece)
            talk.connection.input_audio_buffer.commit()
            talk.connection.response.create()
            answers.append(talk.answer())
    assert answers[0] == answers[1] == answers[2]


def test_the_second_turn_has_the_first_as_its_history(running, question, pipeline):
    with talking(running, **BY_HAND) as talk:
        talk.ask(question)
        talk.answer()
        first = talk.events[-1].response.usage
        talk.ask(question)
        talk.answer()
        second = talk.events[-1].response.usage
        assert second.input_tokens > first.input_tokens + first.output_tokens


def test_typed_items_and_text_replies(running, pipeline):
    with talking(running, output_modalities=["text"], **BY_HAND) as talk:
        added = talk.type("hello")
        talk.connection.response.create(response={"max_output_tokens": 4})
        done = talk.until("response.done").response
        deltas = [each.delta for each in talk.events if each.type == "response.output_text.delta"]
        assert done.output[0].content[0].text == "".join(deltas)
        assert done.usage.output_tokens <= 4
        talk.connection.conversation.item.retrieve(item_id=added.id)
        assert talk.until("conversation.item.retrieved").item.content[0].text == "hello"
        talk.connection.conversation.item.delete(item_id=added.id)
        assert talk.until("conversation.item.deleted").item_id == added.id


def test_the_users_words_are_sent_where_they_are_asked_for(running, question):
    audio = {"input": {"turn_detection": None, "transcription": {"model": "tiny"}}}
    with talking(running, audio=audio) as talk:
        talk.ask(question)
        said = talk.until("conversation.item.input_audio_transcription.completed")
        assert said.transcript == "the blue key"


def test_a_reply_that_is_cut_is_a_history_of_what_was_heard(running, question, pipeline, dialogues):
    """After each cut, the next reply equals that to a prompt which holds only the parts that were heard."""
    with talking(running, **BY_HAND) as talk:
        (dialogue,) = dialogues
        for ms in range(0, 50 * CUTS, 50):
            talk.ask(question)
            talk.answer()
            item = dialogue.items[-1]
            request = dialogue.request(item, GenerationOptions(do_sample=False), "none")
            fresh = Request(request.prompt, request.options, "none")
            *_, reply = pipeline.backend.stream(fresh)
            assert reply.token_ids == item.reply
            if (
                item.seconds * 1000 < ms
            ):  # what the tiny model says to a history it has never seen may be short
                continue
            whole = list(item.reply)
            talk.connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=ms)
            talk.until("conversation.item.truncated")
            assert item.reply == heard_part(
                whole, int(ms / 1000 * pipeline.codec.frame_rate), dialogue._tokens
            )


SILENCE = bytes(2 * RATE)


def test_the_server_finds_the_turns(running, question, loud_is_speech):
    with talking(running) as talk:
        talk.say(SILENCE + question + SILENCE)
        started = talk.until("input_audio_buffer.speech_started")
        stopped = talk.until("input_audio_buffer.speech_stopped")
        assert abs(started.audio_start_ms - 1000) < 100
        assert abs(stopped.audio_end_ms - 1000 - len(question) / 2 / RATE * 1000) < 150
        committed = talk.until("input_audio_buffer.committed")
        assert committed.item_id == started.item_id
        assert len(talk.answer()[1]) > 0


def test_speaking_interrupts_the_reply(running, question, loud_is_speech, dialogues, monkeypatch):
    """The sound ends with the event that reports speech, and the history with what can have been heard."""
    with talking(running) as talk:
        talk.say(question + SILENCE)
        talk.until("response.done")
        item = dialogues[0].items[-1]
        whole = list(item.reply)
        assert item.seconds > 1
        clock = SimpleNamespace(perf_counter=lambda: item.begun + 0.5)
        monkeypatch.setattr(turns, "time", clock)  # half a second of it can have been heard
        talk.say(question[: RATE // 2])
        talk.until("input_audio_buffer.speech_started")
        cut = talk.until("conversation.item.truncated")
        assert cut.item_id == item.id
        assert cut.audio_end_ms == 500
        assert len(item.reply) < len(whole)


def test_no_sound_follows_an_interruption(running, question, loud_is_speech, endless):
    """A reply that is still generated when the user speaks ends as cancelled."""
    with talking(running) as talk:
        talk.say(question + SILENCE)
        talk.until("response.output_audio.delta")
        talk.say(question[: RATE // 2])
        talk.until("input_audio_buffer.speech_started")
        place = len(talk.events)
        done = talk.until("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "turn_detected")
        assert "response.output_audio.delta" not in [event.type for event in talk.events[place:]]
    running.assert_nothing_is_left()


def test_a_client_cancels_a_reply(running, question, endless):
    with talking(running, **BY_HAND) as talk:
        talk.ask(question)
        talk.until("response.output_audio.delta")
        talk.connection.response.cancel()
        done = talk.until("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
        talk.connection.response.cancel()
        assert talk.until("error").error.code == "response_cancel_not_active"


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ("{", None),
        ("[]", None),
        ('{"type": "no.such.event"}', "type"),
        ('{"type": "response.create", "extra": 1}', "extra"),
        ('{"type": "session.update", "session": {"audio": {"output": {"speed": 2}}}}', "session.audio.output.speed"),
        ('{"type": "session.update", "session": {"tools": [{}]}}', "session.tools"),
        ('{"type": "session.update", "session": {"model": "other"}}', "model"),
        ('{"type": "input_audio_buffer.append", "audio": "?"}', "audio"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "audio"),
        ('{"type": "input_audio_buffer.commit"}', None),
        ('{"type": "conversation.item.delete", "item_id": "x"}', "item_id"),
        ('{"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": -1}', "audio_end_ms"),
        ('{"type": "conversation.item.create", "item": {"type": "message", "role": "user"}}', "item.content"),
    ],
)  # fmt: skip
def test_a_wrong_event_gets_an_error_and_the_connection_goes_on(running, event, param):
    address = running.address.replace("http", "ws") + "/v1/realtime?model=tiny"
    with websockets.sync.client.connect(address) as socket:
        assert json.loads(socket.recv())["type"] == "session.created"
        socket.send(event)
        answer = json.loads(socket.recv())
        assert answer["type"] == "error"
        assert answer["error"]["param"] == param
        socket.send('{"type": "input_audio_buffer.clear"}')
        assert json.loads(socket.recv())["type"] == "input_audio_buffer.cleared"


@pytest.mark.parametrize("keys", [["none", "other"], []])
def test_a_key_or_all_clients_without_keys_have_a_limited_number_of_connections(pipeline, serve, keys):
    with serve(pipeline, keys, sessions_per_key=1) as narrow, talking(narrow):
        with narrow.client().realtime.connect(model="tiny") as second:
            assert Talk(second).until("error").error.code == "too_many_sessions"
        with narrow.client("other").realtime.connect(model="tiny") as third:
            Talk(third).until("session.created" if keys else "error")


def test_an_idle_connection_is_closed(pipeline, serve):
    with (
        serve(pipeline, idle_seconds=0.3) as hasty,
        hasty.client().realtime.connect(model="tiny") as connection,
    ):
        talk = Talk(connection)
        talk.until("session.created")
        assert talk.until("error").error.code == "idle_timeout"


def test_a_server_that_ends_lets_a_reply_that_was_announced_end_first(pipeline, serve, monkeypatch):
    """The server drains after ``response.created`` and before the reply has a slot."""
    gate, prepare = threading.Event(), turns.Dialogue.request

    def held(self, *arguments) -> Request:
        assert gate.wait(60)
        return prepare(self, *arguments)

    with serve(pipeline) as ending, talking(ending, **BY_HAND) as talk:
        monkeypatch.setattr(turns.Dialogue, "request", held)
        talk.type("hello")
        talk.connection.response.create(response={"max_output_tokens": 4})
        talk.until("response.created")
        ending.loop.call_soon_threadsafe(ending.server.drain)
        eventually(lambda: ending.service.draining)
        assert not ending.service.idle
        gate.set()
        assert talk.until("response.done").response.status_details.reason == "max_output_tokens"
        eventually(lambda: ending.server.should_exit)


def test_a_server_that_ends_begins_no_reply(pipeline, serve):
    with serve(pipeline) as ending, talking(ending, **BY_HAND) as talk:
        ending.service.draining = True
        talk.connection.response.create()
        assert talk.until("error").error.code == "shutting_down"
        assert ending.service.idle


def test_a_page_of_another_site_cannot_connect(running):
    address = running.address.replace("http", "ws") + "/v1/realtime"
    with (
        pytest.raises(websockets.exceptions.InvalidStatus),
        websockets.sync.client.connect(address, origin="https://evil.example"),
    ):
        pass


def test_the_detector_leaves_torchs_threads_alone():
    from vita_audio.serving.detection import TurnDetector

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        detector = TurnDetector()
        assert detector.push(torch.zeros(16_000)) == []
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_connection_that_ends_leaves_nothing(running, question, caplog):
    for _ in range(5):
        with talking(running, **BY_HAND) as talk:
            talk.ask(question)
            talk.until("response.created")
    running.assert_nothing_is_left()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
