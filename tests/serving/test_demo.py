"""Gradio's pages through their API: a conversation with history, transcription, reading aloud, another's voice."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import safehttpx
import soundfile
from gradio import processing_utils
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from vita_audio.inference import prompts
from vita_audio.serving.config import ServeOptions
from vita_audio.serving.demo import CHECKPOINT, open_demo


@pytest.fixture(scope="module")
def client(pipeline) -> Client:
    with open_demo(pipeline, ServeOptions(port=0, text_characters=100), "tiny") as address:
        yield Client(address, verbose=False)


def test_a_clip_is_transcribed(client, tiny_world):
    clip = handle_file(tiny_world.audio("question.wav"))
    assert client.predict(clip, CHECKPOINT, api_name="/transcribe") == "the blue key"


@pytest.mark.parametrize("cloned", [False, True])
def test_a_text_is_read_as_the_pipeline_reads_it(client, pipeline, tiny_world, cloned):
    clip = tiny_world.audio("reading.wav")
    name, voice = ("/clone", [handle_file(clip)]) if cloned else ("/speak", [])
    expected = pipeline.reply(prompts.synthesis("the quiet river runs", clip if cloned else None))
    if expected.waveform is None:  # the tiny model has not learnt to take every voice
        with pytest.raises(AppError, match="did not speak"):
            client.predict("the quiet river runs", *voice, CHECKPOINT, api_name=name)
        return
    samples, rate = soundfile.read(client.predict("the quiet river runs", *voice, CHECKPOINT, api_name=name))
    assert (rate, len(samples)) == (expected.sample_rate, len(expected.waveform))


def test_a_conversation_remembers_its_turns_until_it_begins_again(client, tiny_world):
    question = handle_file(tiny_world.audio("question.wav"))
    history, sound, *_ = client.predict(question, "", CHECKPOINT, api_name="/talk")
    assert soundfile.info(sound).duration > 0.1
    assert [turn["role"] for turn in history] == ["user", "assistant"]
    history, *_ = client.predict(None, "hello", "turbo", api_name="/talk")
    assert [turn["role"] for turn in history] == ["user", "assistant", "user", "assistant"]
    assert client.predict(api_name="/begin_again") == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("/talk", (None, " ", CHECKPOINT), "type a question"),
        ("/transcribe", (None, CHECKPOINT), "upload a clip"),
        ("/speak", ("x" * 200, CHECKPOINT), "100 characters"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(client, name, arguments, message):
    with pytest.raises(AppError, match=message):
        client.predict(*arguments, api_name=name)


def test_a_file_that_is_no_sound_is_refused(client, tmp_path):
    file = tmp_path / "no.wav"
    file.write_bytes(b"RIFF no sound at all")
    with pytest.raises(AppError):
        client.predict(handle_file(str(file)), CHECKPOINT, api_name="/transcribe")


def call(client: Client, name: str, *data) -> str:
    """What the API answers, without the official client, which uploads a file before it names its path."""
    address = f"{client.src.rstrip('/')}/gradio_api/call/{name}"
    event = httpx.post(address, json={"data": data}).json()["event_id"]
    return httpx.get(f"{address}/{event}", timeout=60).text


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """The addresses that Gradio would open."""
    addresses: list[str] = []

    async def record(address: str, *_: object) -> None:
        addresses.append(address)
        raise OSError("opened")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_get", record)
    monkeypatch.setattr(safehttpx, "async_validate_url", record)
    return addresses


@pytest.mark.parametrize("name", ["talk", "transcribe", "clone"])
def test_no_file_and_no_address_that_a_client_names_is_opened(client, tiny_world, fetched, name):
    before = {"talk": [], "transcribe": [], "clone": ["hello"]}[name]
    after = {"talk": ["", CHECKPOINT], "transcribe": [CHECKPOINT], "clone": [CHECKPOINT]}[name]
    of_the_server = str(tiny_world.audio("question.wav"))
    for path in (of_the_server, "/etc/passwd", "https://example.com/x.wav", "http://127.0.0.1:1/x.wav"):
        clip = {"path": path, "meta": {"_type": "gradio.FileData"}}
        answer = call(client, name, *before, clip, *after)
        assert answer.startswith("event: error"), path
    assert fetched == []


def test_no_address_is_fetched_for_a_client(client, fetched):
    place = f"{client.src.rstrip('/')}/gradio_api"
    for path in ("file=https://example.com/", "file=http:%2F%2Fexample.com/", "proxy=https://example.com/"):
        assert httpx.get(f"{place}/{path}").status_code in (400, 403)
    for path in ("file=/etc/passwd", f"file={__file__}"):
        assert httpx.get(f"{place}/{path}").status_code in (403, 404)
    assert fetched == []


def test_the_originals_command_serves_the_page_or_with_a_flag_gradios(
    tiny_world, codec_flags, capsys, monkeypatch
):
    from vita_audio.cli import serve

    served = []
    monkeypatch.setattr(serve, "main", served.append)
    serve.web_demo(["--port", "0"])
    assert served == [["--port", "0"]]
    monkeypatch.setattr(serve, "wait_for_a_signal", lambda: None)
    serve.web_demo(
        ["--gradio", "--port", "0", "--model_name_or_path", str(tiny_world.model_dir), *codec_flags]
    )
    assert "pages for files: http://127.0.0.1:" in capsys.readouterr().out
