"""What is refused, and how: OpenAI's form, the field's name, one line; the server goes on."""

from __future__ import annotations

import base64
import io
import logging
import socket
import threading

import httpx2 as httpx
import numpy as np
import openai
import pytest
import soundfile
from waiting import eventually

HELLO = [{"role": "user", "content": "hello"}]
MISSPELT = {"role": "user", "content": [{"type": "text", "txt": ""}]}
SPEECH = {"model": "tiny", "input": "hello"}
CHAT = {"model": "tiny", "messages": HELLO}


def post(running, path: str, **content) -> httpx.Response:
    return httpx.post(f"{running.address}/v1/{path}", timeout=30, **content)


def error(response: httpx.Response) -> dict:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"] | {"status": response.status_code}


def sound(content: bytes, place: str = "input_audio") -> list[dict]:
    part = {"type": place, place: {"data": base64.b64encode(content).decode(), "format": "wav"}}
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("audio/speech", SPEECH | {"respones_format": "wav"}, "respones_format"),
        ("audio/speech", SPEECH | {"response_format": "aac"}, "response_format"),
        ("audio/speech", SPEECH | {"speed": 2}, "speed"),
        ("audio/speech", SPEECH | {"instructions": "whisper"}, "instructions"),
        ("audio/speech", SPEECH | {"voice": "nobody"}, "voice"),
        ("audio/speech", SPEECH | {"voice": "../reader"}, "voice"),
        ("audio/speech", SPEECH | {"voice_audio": "?"}, "voice_audio"),
        ("audio/speech", SPEECH | {"input": "x" * 5000}, "input"),
        ("audio/speech", SPEECH | {"input": " "}, "input"),
        ("audio/speech", SPEECH | {"mode": "fastest"}, "mode"),
        ("audio/speech", SPEECH | {"mode": [2.5]}, "mode[0]"),
        ("audio/speech", SPEECH | {"mode": []}, "mode"),
        ("chat/completions", CHAT | {"messages": [MISSPELT]}, "messages[0].content[0].text"),
        ("audio/speech", SPEECH | {"temperature": 3}, "temperature"),
        ("audio/speech", {"model": "tiny"}, "input"),
        ("audio/speech", SPEECH | {"model": "other"}, "model"),
        ("chat/completions", CHAT | {"tools": []}, "tools"),
        ("chat/completions", CHAT | {"n": 2}, "n"),
        ("chat/completions", CHAT | {"messages": []}, "messages"),
        ("chat/completions", CHAT | {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ("chat/completions", CHAT | {"messages": [HELLO[0] | {"x": 1}]}, "messages[0].x"),
        ("chat/completions", CHAT | {"messages": [*HELLO, {"role": "assistant", "content": "hi"}]}, "messages"),
        ("chat/completions", CHAT | {"messages": sound(b"no sound")}, "messages[0].content[0].input_audio.data"),
        ("chat/completions", CHAT | {"modalities": ["text", "audio"]}, "audio"),
        ("chat/completions", CHAT | {"modalities": ["audio"]}, "modalities"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(running, path, body, param):
    refused = error(post(running, path, json=body))
    assert refused["param"] == param
    assert 400 <= refused["status"] < 500


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://127.0.0.1:1/x.wav", "/etc/passwd"])
def test_no_path_or_address_of_a_client_is_opened(running, url):
    part = {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    assert error(post(running, "chat/completions", json=body))["code"] in ("invalid_value", "invalid_audio")
    part = {"type": "audio_url", "audio_url": {"url": url}}
    body = CHAT | {"messages": [{"role": "user", "content": [part]}]}
    assert error(post(running, "chat/completions", json=body))["status"] == 400


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    ],
)
def test_a_body_that_is_no_json_is_refused(running, content, status):
    headers = {"Content-Type": "application/json"}
    assert error(post(running, "chat/completions", content=content, headers=headers))["status"] == status


def test_pages_of_other_sites_are_refused(running):
    """A browser sends plain text to any address without asking, and says from which page it comes."""
    assert error(post(running, "chat/completions", content=b"{}"))["status"] == 415
    headers = {"Origin": "https://evil.example"}
    assert error(post(running, "chat/completions", json=CHAT, headers=headers))["code"] == "forbidden_origin"
    headers = {"Host": "evil.example"}
    assert error(post(running, "chat/completions", json=CHAT, headers=headers))["code"] == "forbidden_host"
    assert (
        post(running, "chat/completions", json=CHAT, headers={"Origin": running.address}).status_code == 200
    )


def test_forms_are_checked_like_bodies(running, tiny_world):
    clip = open(tiny_world.audio("question.wav"), "rb").read()  # noqa: SIM115
    refused = error(post(running, "audio/transcriptions", data={"model": "tiny"}, files={"sound": clip}))
    assert refused["param"] == "sound"
    refused = error(
        post(running, "audio/transcriptions", data={"model": "tiny", "x": "1"}, files={"file": clip})
    )
    assert refused["param"] == "x"
    refused = error(post(running, "audio/transcriptions", files={"file": clip}))
    assert refused["param"] == "model"
    refused = error(
        post(running, "audio/transcriptions", data={"model": "tiny"}, files={"file": clip[:3000]})
    )
    assert refused["param"] == "file"
    assert refused["code"] == "invalid_audio"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert error(post(running, "audio/transcriptions", content=b"--x\r\n?", headers=headers))["status"] == 400


def test_a_clip_that_is_too_long_is_refused_before_it_is_decoded(running):
    content = io.BytesIO()
    soundfile.write(content, np.zeros(8000 * 600, "int16"), 8000, format="FLAC")
    refused = error(post(running, "chat/completions", json=CHAT | {"messages": sound(content.getvalue())}))
    assert "600.0 s" in refused["message"]


def test_a_clip_that_kills_its_decoder_costs_one_error(running):
    decoder = running.service.clips
    decoder.start()
    decoder._process.kill()
    decoder._process.wait()
    tone = io.BytesIO()
    soundfile.write(tone, np.zeros(8000, "float32"), 8000, format="WAV")
    assert (
        post(running, "chat/completions", json=CHAT | {"messages": sound(tone.getvalue())}).status_code == 200
    )


def test_a_large_body_is_refused_with_and_without_a_stated_length(pipeline, serve):
    with serve(pipeline, body_megabytes=0.01) as small:
        assert error(post(small, "chat/completions", json=CHAT | {"user": "x" * 20_000}))["status"] == 413
        headers = {"Content-Type": "application/json"}
        pieces = (b" " * 1000 for _ in range(20))
        assert error(post(small, "chat/completions", content=pieces, headers=headers))["status"] == 413
        assert post(small, "chat/completions", json=CHAT).status_code == 200


def test_a_key_is_needed_where_there_are_keys(pipeline, serve):
    with serve(pipeline, keys=["first", "second"]) as guarded:
        for key in ("first", "second"):
            assert guarded.client(key).models.list().data
        with pytest.raises(openai.AuthenticationError) as refused:
            guarded.client("third").models.list()
        assert refused.value.code == "invalid_api_key"
        assert httpx.get(f"{guarded.address}/health").status_code == 200


def test_a_page_that_is_allowed_may_use_the_server(pipeline, serve):
    with serve(pipeline, cors_origins=["https://our.example"]) as open_to_one:
        headers = {"Origin": "https://our.example"}
        response = post(open_to_one, "chat/completions", json=CHAT, headers=headers)
        assert response.headers["access-control-allow-origin"] == "https://our.example"
        preflight = {
            **headers,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        assert httpx.options(f"{open_to_one.address}/v1/models", headers=preflight).status_code == 200


LONG = {"model": "tiny", "messages": HELLO, "repetition_penalty": 10, "mode": "vanilla", "stream": True}


def test_more_requests_than_fit_the_queue_are_refused(pipeline, serve):
    with serve(pipeline, slots=1, queue=0) as narrow, hold(narrow):
        refused = post(narrow, "chat/completions", json=CHAT)
        assert error(refused)["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"


def hold(running):
    """A context in which a reply holds a slot: it waits for a lock that the context holds."""

    class Held:
        def __enter__(self) -> None:
            self.gate, held = threading.Event(), threading.Event()
            backend, gate = running.service.pipeline.backend, self.gate
            stream = backend.stream

            def waiting(request):
                held.set()
                gate.wait(60)
                yield from stream(request)

            backend.stream = waiting
            self.answers = []
            self.thread = threading.Thread(
                target=lambda: self.answers.append(post(running, "chat/completions", json=CHAT))
            )
            self.thread.start()
            assert held.wait(60)
            backend.stream = stream

        def __exit__(self, *_: object) -> None:
            self.gate.set()
            self.thread.join()
            assert self.answers[0].status_code == 200

    return Held()


def test_a_server_that_ends_answers_what_runs_and_refuses_the_rest(pipeline, serve):
    with serve(pipeline) as ending:
        with hold(ending):
            ending.loop.call_soon_threadsafe(ending.server.drain)
            eventually(lambda: ending.service.draining)
            refused = post(ending, "chat/completions", json=CHAT)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert httpx.get(f"{ending.address}/health").json() == {"status": "draining"}
        eventually(lambda: ending.server.should_exit)


def test_a_client_that_leaves_frees_its_slot(running):
    body = LONG | {"max_completion_tokens": 1024}
    with httpx.stream("POST", f"{running.address}/v1/chat/completions", json=body, timeout=30) as response:
        next(response.iter_lines())
    running.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", "application/json"),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=x"),
    ],
)
def test_a_client_that_leaves_within_its_body_leaves_no_traceback(running, caplog, path, kind):
    def left() -> float:
        labels = {"path": path, "status": "499"}
        return running.service.metrics.registry.get_sample_value("vita_audio_requests_total", labels) or 0

    before = left()
    host = running.address.removeprefix("http://")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--x\r\n"
    )
    with socket.create_connection(tuple(host.split(":"))) as client:
        client.sendall(head.encode())
        eventually(lambda: not running.service.idle)
    eventually(lambda: left() == before + 1)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_reply_that_takes_too_long_ends_with_an_error(pipeline, serve):
    with serve(pipeline, reply_seconds=0.001) as hasty:
        refused = error(post(hasty, "chat/completions", json=CHAT))
        assert (refused["status"], refused["code"]) == (504, "timeout")


def test_a_failure_inside_shows_nothing_of_the_inside(running, monkeypatch, caplog):
    def broken(request):
        raise RuntimeError("the secret of the inside")
        yield

    monkeypatch.setattr(running.service.pipeline.backend, "stream", broken)
    refused = error(post(running, "chat/completions", json=CHAT))
    assert refused["status"] == 500
    assert "secret" not in refused["message"]
    assert "secret" in caplog.text


def test_the_log_holds_no_content(running, caplog):
    caplog.set_level("INFO", "vita_audio.serving")
    post(running, "chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "my secret"}]})
    eventually(lambda: "POST /v1/chat/completions 200" in caplog.text)
    assert "secret" not in caplog.text


def test_the_log_holds_content_where_it_is_asked_to(pipeline, serve, caplog):
    caplog.set_level("INFO", "vita_audio.serving")
    with serve(pipeline, log_content=True) as talkative:
        post(
            talkative, "chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "my words"}]}
        )
    assert "my words" in caplog.text
