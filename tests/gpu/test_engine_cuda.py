"""The engine on a GPU: recorded rounds give the tokens of ``generate()`` and of the CPU."""

import json
from pathlib import Path

import pytest
import torch
from golden_requests import golden_request
from transformers import AutoModelForCausalLM

import vita_audio  # noqa: F401
from vita_audio.engine import AudioRows, Engine, Request, Sampling

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
CASES = json.loads((GOLDENS / "generation_expected.json").read_text())


@pytest.fixture(scope="module")
def model():
    torch.backends.cuda.matmul.allow_tf32 = False
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").cuda()


def recordings(engine):
    return sum(graph is not None for graph in engine._turns._graphs._graphs.values())


def test_recorded_rounds_give_the_golden_tokens_alone(model):
    engine = Engine(model, max_rows=2, max_length=512)
    for _ in range(3):  # run, recorded, replayed
        for case in CASES:
            assert engine.submit(golden_request(case)).tokens() == case["new_tokens"]
    assert recordings(engine) > 10


def test_recorded_rounds_give_the_golden_tokens_in_company(model):
    engine = Engine(model, max_rows=4, max_length=512)
    for _ in range(3):
        handles = [engine.submit(golden_request(case)) for case in CASES]
        assert [handle.tokens() for handle in handles] == [case["new_tokens"] for case in CASES]
    assert recordings(engine) > 10


def test_without_recordings_the_tokens_are_the_same(model, monkeypatch):
    monkeypatch.setenv("VITA_AUDIO_CUDA_GRAPHS", "0")
    engine = Engine(model, max_rows=4, max_length=512)
    assert [engine.submit(golden_request(case)).tokens() for case in CASES] == [
        case["new_tokens"] for case in CASES
    ]
    assert recordings(engine) == 0


def test_lossless_and_speech_rows_equal_the_cpu(model):
    rows = AudioRows(500, 501)
    on_cpu = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint")
    engines = [Engine(each, max_rows=3, max_length=300, speech=rows) for each in (on_cpu, model)]
    prompt = CASES[0]["prompt"]
    wanted = [
        Request(prompt, "vanilla", max_new_tokens=40),
        Request(prompt, lossless=True, max_new_tokens=40),
        Request(prompt, "turbo", audio_rows="on", max_new_tokens=40),
        Request(prompt, "turbo", audio_rows="auto", max_new_tokens=40),
        Request(prompt, "boost", Sampling(True, 1.2, 20, 0.9, 1.1, seed=3), max_new_tokens=40),
    ]
    for _ in range(3):
        cpu, gpu = ([engine.submit(each).tokens() for each in wanted] for engine in engines)
        assert cpu == gpu
        assert cpu[0] == cpu[1]


def test_a_session_continues_on_the_gpu(model):
    engine = Engine(model, max_rows=2, max_length=300)
    session, prompt = engine.session(), list(CASES[0]["prompt"])
    for _ in range(4):
        first = engine.submit(Request(prompt, "boost", max_new_tokens=15, session=session)).tokens()
        assert first == engine.submit(Request(prompt, "boost", max_new_tokens=15)).tokens()
        prompt += [*first, 5, 6]
