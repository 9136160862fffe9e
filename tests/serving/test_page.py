"""The page in headless Chromium, with a WAV as its microphone."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import replace

import pytest
import soundfile
import torch
from playwright.sync_api import sync_playwright

from vita_audio.audio import load_audio
from vita_audio.inference import AudioChunk

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--autoplay-policy=no-user-gesture-required"]


@pytest.fixture
def microphone(tiny_world, tmp_path):
    """A question between silences; Chromium plays it from its beginning when the microphone is opened, over and over.

    A slow machine still connects in the first silence.
    """
    question, rate = load_audio(tiny_world.audio("question.wav"))
    silence = torch.zeros(15 * rate)
    file = tmp_path / "microphone.wav"
    soundfile.write(file, torch.cat([silence[: 2 * rate], question, silence]).numpy(), rate)
    return file


@pytest.fixture
def page(running, microphone):
    with sync_playwright() as playwright:
        flags = [*FLAGS, "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": 390, "height": 780})
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
        page.goto(running.address)
        page.wait_for_selector("#model:has-text('tiny')")
        yield page
        assert page.faults == []
        browser.close()


def test_a_question_into_the_microphone_is_answered_and_can_be_interrupted(page, loud_is_speech, endless):
    page.click("#talk")
    page.wait_for_selector("li.model small:has-text('first sound')", timeout=30_000)
    assert page.locator("li.you").count() == 1
    page.click("#interrupt")
    page.wait_for_selector("li.model small:has-text('interrupted')", timeout=10_000)
    for _ in range(2):
        page.click("#talk")
    page.wait_for_selector("li.model >> nth=1", timeout=30_000)  # the microphone asks again
    page.click("#talk")
    assert page.inner_text("#talk") == "Start talking"


def test_a_reply_can_be_interrupted_while_its_next_sound_is_late(page, running, monkeypatch):
    stream = running.service.pipeline.backend.stream

    def late(request):
        with closing(stream(request)) as events:
            chunks = (event for event in events if isinstance(event, AudioChunk) and len(event.samples))
            sound = next(chunks)
            sound = replace(sound, samples=sound.samples[:2400])  # 0.1 s
            while True:
                yield sound
                time.sleep(2)

    monkeypatch.setattr(running.service.pipeline.backend, "stream", late)
    page.fill("#text", "hello")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.model small:has-text('first sound')", timeout=30_000)
    page.wait_for_timeout(700)
    page.click("#interrupt")
    page.wait_for_selector("li.model small:has-text('interrupted after 0.1 s')", timeout=5_000)


def test_a_question_can_be_typed_with_the_keyboard_alone(page):
    page.focus("#text")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector("li.model", timeout=30_000)
    assert page.inner_text("li.you .said") == "hello"


def test_earlier_turns_are_forgotten_where_they_are_not_wanted(page):
    page.uncheck("#remember")
    deleted = []
    page.on(
        "websocket",
        lambda socket: socket.on("framesent", lambda frame: deleted.append("item.delete" in frame)),
    )
    for count in (1, 2):
        page.fill("#text", "hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"li.model >> nth={count - 1}")
        page.wait_for_selector("#interrupt:disabled")
    assert sum(deleted) == 2


def test_nothing_is_wider_than_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_voices_and_modes_can_be_chosen(page):
    assert page.locator("#voice option").all_inner_texts() == ["default", "reader"]
    assert "turbo" in page.locator("#mode option").all_inner_texts()


def test_a_refused_microphone_is_said(running):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*FLAGS, "--deny-permission-prompts"]
        )
        page = browser.new_page()
        page.goto(running.address)
        page.click("#talk")
        page.wait_for_selector("#status.error:has-text('microphone was refused')", timeout=10_000)
        browser.close()
