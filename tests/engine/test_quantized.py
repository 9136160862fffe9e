"""Weights in 8 bits: how near their products are, and that rows stay apart."""

import copy

import pytest
import torch

from vita_audio.engine import Engine, Request
from vita_audio.engine.kernels import Product
from vita_audio.engine.quantized import LARGEST_WITHOUT_VNNI, Int8Product
from vita_audio.engine.weights import Weights
from vita_audio.inference import RuntimeOptions

from .conftest import random_model


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 200, generator=generator) / 14 for rows in (300, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_within_two_percent_whatever_the_scale_of_a_row(weights, dtype):
    weights = [each.to(dtype) for each in weights]
    bias = torch.randn(300, dtype=dtype)
    # Rows of very different sizes: each has its own scale.
    x = torch.randn(11, 200).mul_(torch.logspace(-3, 3, 11)[:, None]).to(dtype)
    exact, ours = Product(weights)(x), Int8Product(weights)(x)
    assert ours.dtype == dtype
    assert ((ours - exact).float().norm(dim=1) < 0.02 * exact.float().norm(dim=1)).all()
    add = torch.randn(11, 400, dtype=dtype)
    torch.testing.assert_close(Int8Product(weights)(x, add=add), ours + add, rtol=0.02, atol=0.02)
    offset = torch.cat([bias, torch.zeros(100, dtype=dtype)])
    torch.testing.assert_close(Int8Product(weights, [bias, None])(x), ours + offset, rtol=0.02, atol=0.02)


def test_a_row_of_zeros_gives_zeros(weights):
    assert not Int8Product(weights)(torch.zeros(2, 200)).any()


def test_a_row_is_the_same_to_the_bit_in_any_company(weights):
    product, x = Int8Product(weights), torch.randn(30, 200)
    together = product(x)
    for rows in (1, 2, 11):
        assert torch.equal(product(x[:rows]), together[:rows])


def test_without_vnni_weights_are_small_enough_for_sums_of_16_bits(weights, monkeypatch):
    packed = []
    prepack = torch.ops.onednn.qlinear_prepack
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(
        torch.ops.onednn,
        "qlinear_prepack",
        lambda weight, shape: packed.append(weight) or prepack(weight, shape),
    )
    x = torch.randn(4, 200)
    ours, exact = Int8Product(weights)(x), Product(weights)(x)
    assert packed[0].abs().max() == LARGEST_WITHOUT_VNNI
    assert (ours - exact).norm() < 0.03 * exact.norm()


def test_replies_in_company_are_those_alone():
    model = random_model()
    engine = Engine(model, max_rows=4, max_length=120, quantization="int8")

    def request(row: int) -> Request:
        return Request(list(range(1 + row, 9 + 2 * row)), ("turbo", "boost")[row % 2], max_new_tokens=60)

    alone = [engine.submit(request(row)).tokens() for row in range(4)]
    handles = [engine.submit(request(row)) for row in range(4)]
    assert [handle.tokens() for handle in handles] == alone
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_the_logits_stay_near_and_the_matrices_take_no_memory_afterwards():
    model = random_model(hidden_size=64, intermediate_size=128)
    plain = Weights(copy.deepcopy(model))
    small = Weights(model, quantization="int8", free=True)
    x = torch.randn(5, 64)
    exact, ours = plain.lm_head(x), small.lm_head(x)
    assert (ours - exact).norm() < 0.02 * exact.norm()
    left = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "bias" not in name)
    assert left == model.get_input_embeddings().weight.numel()
    assert small.backbone_bytes * 4 == plain.backbone_bytes


def test_shared_embeddings_are_kept():
    model = random_model(tie_word_embeddings=True)
    weights = Weights(model, quantization="int8", free=True)
    assert model.get_input_embeddings().weight.numel()
    assert len(weights.lm_head(torch.randn(1, weights.d))[0]) == weights.vocab_size


def test_other_devices_and_kinds_are_refused_by_name():
    with pytest.raises(
        ValueError, match="quantization=int8: the engine has it on CPUs, and on GPUs where Triton runs"
    ):
        Weights(random_model().to("meta"), quantization="int8")
    with pytest.raises(ValueError, match="quantization='int3': use none, int8"):
        RuntimeOptions(quantization="int3")
    with pytest.raises(ValueError, match="needs the engine"):
        RuntimeOptions(quantization="int8", engine=False)
