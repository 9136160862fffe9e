"""The engine on a GPU: recorded rounds give the tokens of ``generate()`` and of the CPU."""

import json
from pathlib import Path

import pytest
import torch
from golden_requests import golden_request
from transformers import AutoModelForCausalLM

import vita_audio  # noqa: F401
from vita_audio.engine import AudioRows, Engine, Request, Sampling, triton_kernels
from vita_audio.engine.quantized import to_int8

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


def near(ours, exact, tolerance=6e-3):
    return ((ours.double() - exact).norm() / exact.norm()).item() < tolerance


def test_attention_at_the_shapes_of_7b_in_bfloat16():
    """Eight rows of a round: near to float64, and each the same to the bit alone."""
    torch.manual_seed(0)
    cache = torch.randn(2, 8, 4, 1200, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(8 * 11, 28, 128, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([40, 100, 256, 257, 500, 777, 1024, 1100], device="cuda")
    positions = ends[:, None] - 11 + torch.arange(11, device="cuda")
    heard = triton_kernels.attend(query, cache, positions, 0, 1100, None).view(8, 11, 28, 128)
    for row, end in enumerate(ends.tolist()):
        keys, values = cache[:, row, :, :end].double().repeat_interleave(7, dim=1)
        mine = slice(11 * row, 11 * row + 11)
        scores = query[mine].double().transpose(0, 1) @ keys.transpose(1, 2) / 128**0.5
        hidden = torch.arange(end, device="cuda") > positions[row][:, None]
        exact = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
        assert near(heard[row], exact)
        alone = triton_kernels.attend(query[mine], cache, positions[row : row + 1], row, end, None)
        assert torch.equal(alone.view(11, 28, 128), heard[row])


@pytest.mark.parametrize(("outputs", "inputs"), [(4608, 3584), (3584, 18944), (16400, 3584)])
def test_products_of_8_bits_at_the_shapes_of_7b_in_bfloat16(outputs, inputs):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(600, inputs, device="cuda", dtype=torch.bfloat16)
    product = triton_kernels.Int8WeightProduct([weight])
    whole, scale = to_int8(weight)
    exact = x.double() @ (whole.double() * scale.double()[:, None]).T
    for rows in (1, 11, 88, 600):
        for _ in range(2):  # what blocks count on must be as before
            ours = product(x[:rows])
            assert near(ours, exact[:rows])
    assert near(product(x), x.double() @ weight.double().T, 0.02)
    assert torch.equal(product(x[:1]), product(x[:11])[:1])


def test_replies_of_8_bits_in_company_are_those_alone(model):
    engine = Engine(model, max_rows=4, max_length=300, quantization="int8")
    wanted = [Request([5 + row, *CASES[0]["prompt"][:20]], "turbo", max_new_tokens=40) for row in range(4)]
    for _ in range(3):
        alone = [engine.submit(each).tokens() for each in wanted]
        handles = [engine.submit(each) for each in wanted]
        assert [handle.tokens() for handle in handles] == alone
