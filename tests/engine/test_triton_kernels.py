"""The GPU's own kernels, on a CPU interpreted: each against PyTorch, and whole replies against the goldens."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from golden_requests import golden_request
from torch.nn.functional import rms_norm

from vita_audio.engine import Engine, Request, kernels, triton_kernels, weights
from vita_audio.engine.quantized import to_int8
from vita_audio.engine.state import causal_mask

from .conftest import GOLDENS

CASES = json.loads((GOLDENS / "generation_expected.json").read_text())

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu_if_there_is_one():
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(None)


def test_the_norm_is_pytorchs():
    x, weight = torch.randn(3, 2, 100)[:, 1], torch.randn(100)
    torch.testing.assert_close(triton_kernels.rms_norm(x, weight, 1e-6), rms_norm(x, (100,), weight, 1e-6))


def test_the_gate_is_that_of_the_cpu():
    x = torch.randn(3, 2 * 1030)
    torch.testing.assert_close(triton_kernels.gate(x), kernels.gate(x))


def test_the_rotation_fills_the_cache_as_on_the_cpu():
    queries, kv, size, tokens = 4, 2, 16, 3
    qkv, cos, sin = (torch.randn(tokens, queries + 2 * kv, size) for _ in range(3))
    places = torch.randperm(2 * 2 * kv * 9)[: tokens * 2 * kv]
    ours, theirs = torch.zeros(2, 2, kv, 9, size), torch.zeros(2, 2, kv, 9, size)
    query = triton_kernels.rotate(qkv, cos, sin, ours, places, queries)
    expected, keys_values = kernels.rotate(qkv, cos, sin, 1, tokens, queries, kv)
    theirs.view(-1, size).index_copy_(0, places, keys_values)
    torch.testing.assert_close(ours, theirs)
    by_head = expected.view(kv, queries // kv, tokens, size).permute(2, 0, 1, 3)
    torch.testing.assert_close(query, by_head.reshape(tokens, queries, size))


@pytest.mark.parametrize("reach", [None, 40])
@pytest.mark.parametrize("width", [1, 11])
def test_attention_over_chunks_of_the_cache_is_that_over_all(width, reach):
    """Three rows of six, one ending in each chunk of the cache; the third sees no key of the last chunk."""
    queries, kv, size, length = 6, 2, 16, 2 * triton_kernels.CHUNK + 50
    cache = torch.randn(2, 6, kv, length + 5, size)
    query = torch.randn(3 * width, queries, size)
    ends = torch.tensor([30, 300, length])
    positions = ends[:, None] - width + torch.arange(width)
    heard = triton_kernels.attend(query, cache, positions, 2, length, reach)
    by_head = query.view(3, width, kv, queries // kv, size).permute(0, 2, 3, 1, 4).reshape(3, kv, -1, size)
    mask = causal_mask(positions, torch.arange(length), reach, queries // kv, torch.float32)
    expected = kernels.attend(by_head, cache[0, 2:5, :, :length], cache[1, 2:5, :, :length], mask)
    expected = expected.view(3, kv, queries // kv, width, size).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(heard, expected.reshape(3 * width, -1), rtol=1e-4, atol=1e-5)
    # The second row alone, and over its own length: the same to the bit.
    rows = slice(width, 2 * width)
    alone = triton_kernels.attend(query[rows], cache, positions[1:2], 3, 300, reach)
    assert torch.equal(alone, heard[rows])


@pytest.mark.parametrize("rows", [1, 11, 40, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 200), (70, 1000)])
def test_products_with_weights_of_8_bits(rows, outputs, inputs):
    parts = [torch.randn(outputs, inputs), torch.randn(10, inputs)]
    bias = torch.randn(outputs)
    product = triton_kernels.Int8WeightProduct(parts, [bias, None])
    x = torch.randn(rows, inputs)
    whole, scale = to_int8(torch.cat(parts))
    exact = x.double() @ (whole.double() * scale.double()[:, None]).T
    offset = torch.cat([bias, torch.zeros(10)])
    for _ in range(2):  # what blocks count on must be as before
        torch.testing.assert_close(product(x), (exact + offset).float(), rtol=1e-5, atol=1e-3)
    assert torch.equal(product(x[:1]), product(x[:11])[:1])
    apart = torch.randn(rows, 3, inputs)
    assert torch.equal(product(apart[:, 1]), product(apart[:, 1].contiguous()))
    add = torch.randn(rows, outputs + 10)
    without_bias = triton_kernels.Int8WeightProduct(parts)
    torch.testing.assert_close(without_bias(x, add=add), (exact + add).float(), rtol=1e-5, atol=1e-3)
    assert product.num_bytes < 1.7 * whole.numel()


@pytest.fixture
def on_the_gpus_kernels(monkeypatch):
    for module in (kernels, weights):
        monkeypatch.setattr(module, "gpu_kernels", lambda device: triton_kernels)
    monkeypatch.setattr(weights, "Int8Product", triton_kernels.Int8WeightProduct)


def test_replies_are_the_golden_ones(golden_model, on_the_gpus_kernels):
    engine = Engine(copy.deepcopy(golden_model).to(torch.get_default_device()), max_rows=2, max_length=512)
    cases = [case for case in CASES if len(case["prompt"]) <= triton_kernels.CHUNK][:2]
    handles = [engine.submit(golden_request(case)) for case in cases]
    assert [handle.tokens() for handle in handles] == [case["new_tokens"] for case in cases]


def test_replies_of_8_bits_in_company_are_those_alone(golden_model, on_the_gpus_kernels):
    model = copy.deepcopy(golden_model).to(torch.get_default_device())
    engine = Engine(model, max_rows=2, max_length=100, quantization="int8")
    prompt = CASES[0]["prompt"][:20]
    wanted = [Request([5 + row, *prompt], "turbo", max_new_tokens=11) for row in range(2)]
    alone = [engine.submit(each).tokens() for each in wanted]
    handles = [engine.submit(each) for each in wanted]
    assert [handle.tokens() for handle in handles] == alone


def test_where_triton_cannot_compile_the_engine_says_so_once_and_takes_pytorchs_kernels(monkeypatch, caplog):
    def fail(gate_up):
        raise RuntimeError("Failed to find C compiler.\nSpecify one.")

    monkeypatch.setattr(triton_kernels, "gate", fail)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **where: None)
    monkeypatch.setattr(torch.accelerator, "device_index", nullcontext)
    kernels._tried_on_gpu.cache_clear()
    for _ in range(2):
        assert kernels.gpu_kernels(torch.device("cuda", 0)) is None
    kernels._tried_on_gpu.cache_clear()
    assert caplog.messages == [
        "the engine runs on PyTorch's kernels alone, since Triton cannot run here: Failed to find C compiler."
    ]
    monkeypatch.setenv("VITA_AUDIO_KERNELS", "0")
    assert kernels.gpu_kernels(torch.device("cuda", 0)) is None
    assert len(caplog.messages) == 1


@pytest.mark.slow
def test_all_kernels_compile_for_three_generations_of_gpus():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, script], env=compiling, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "kernels compile" in run.stdout
