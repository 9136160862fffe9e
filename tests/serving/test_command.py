"""The command: what it prints, what it serves, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import httpx2 as httpx
import pytest
import torch

from vita_audio.cli import serve
from vita_audio.cli.arguments import run_command
from vita_audio.serving.config import ServeOptions, read_keys

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_command_serves_until_sigterm(tiny_world, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as errors:
        command = subprocess.Popen(
            [
                sys.executable, REPOSITORY / "tools/serve.py", "--port", "0",
                "--model_name_or_path", tiny_world.model_dir,
                "--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", tiny_world.codec_dir,
            ],
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    try:
        address = command.stdout.readline().split()[-1].removesuffix("/v1")
        assert httpx.get(f"{address}/health").json() == {"status": "ready"}
        page, line = command.stdout.readline(), command.stdout.readline()
        assert f"{address}/" in page
        speech = tmp_path / "speech.wav"
        curl = line.removeprefix("try it:").replace("speech.wav", str(speech)).strip()
        subprocess.run(curl.replace("curl", "curl --silent", 1), shell=True, check=True)
        assert speech.read_bytes()[:4] == b"RIFF"
        command.send_signal(signal.SIGTERM)
        assert command.wait(30) == 0
    finally:
        command.kill()
        command.wait()
        command.stdout.close()
    assert "shutting down" in log.read_text()


def test_without_a_model_the_message_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "QUICKSTART", tmp_path)
    with pytest.raises(SystemExit, match=r"bash scripts/quickstart\.sh"):
        serve.main([])


def test_the_quickstarts_model_is_the_default(monkeypatch, tmp_path, tiny_world):
    model = tmp_path / "stages/finetune_glm4voice_mtp10_stage2/quickstart"
    model.parent.mkdir(parents=True)
    model.symlink_to(tiny_world.model_dir)
    monkeypatch.setattr(serve, "QUICKSTART", tmp_path)
    folder, codec = serve.choose_model(serve.parse([]))
    assert folder == model
    assert codec.audio_tokenizer_path == tmp_path / "codec"


def test_an_address_that_is_taken_is_one_line(running, monkeypatch):
    port = int(running.address.rsplit(":", 1)[1])
    service = running.service
    monkeypatch.setattr(service, "options", ServeOptions(port=port))
    monkeypatch.setattr(service, "running", nullcontext)
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
        asyncio.run(serve.serve(service, ()))


def test_keys_are_read_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n second \n")
    assert read_keys(file) == ("first", "second")
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        read_keys(file)


@pytest.mark.parametrize("wrong", [{"port": 70_000}, {"slots": 0}, {"audio_seconds": float("nan")}])
def test_options_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeOptions(**wrong)


@pytest.mark.parametrize("flags", [["--replicas", "2"], ["--most_replicas", "3"], ["--revision", "x"]])
def test_flags_of_ray_without_ray_are_refused(tiny_world, codec_flags, flags):
    with pytest.raises(ValueError, match="add --ray or --ray_address"):
        serve.main(["--model_name_or_path", str(tiny_world.model_dir), *codec_flags, *flags])


def test_gradios_pages_are_not_deployed_on_ray():
    with pytest.raises(ValueError, match="do not run on Ray"):
        serve.web_demo(["--gradio", "--ray"])


def test_a_folder_of_voices_that_does_not_exist_is_one_line(tiny_world, tmp_path):
    flags = ["--model_name_or_path", tiny_world.model_dir, "--audio_tokenizer_type", "mel_vq"]
    flags += ["--audio_tokenizer_path", tiny_world.codec_dir, "--voices_dir", tmp_path / "none"]
    with pytest.raises(SystemExit, match="there is no such folder"):
        run_command(lambda: serve.main([str(flag) for flag in flags]))


@pytest.mark.parametrize(("given", "expected"), [(None, 3), ("5", 2)])
def test_the_server_leaves_half_of_the_cores_free(given, expected, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        serve.leave_cores_free()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
