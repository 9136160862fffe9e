"""The chunked loss against PyTorch's own, and the memory it needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from vita_audio.models import loss as loss_module
from vita_audio.models.loss import LanguageModelHead, shifted_targets


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 40),
    chunk=st.integers(1, 300),
    trainable=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_losses_and_gradients_equal_full_logits(rows, chunk, trainable, seed):
    torch.manual_seed(seed)
    head = LanguageModelHead(12, 30, bias=False).requires_grad_(trainable)
    hidden = torch.randn(rows, 12, requires_grad=True)
    targets, scales = torch.randint(30, (rows,)), torch.rand(rows)
    plain = cross_entropy(hidden @ head.weight.T, targets, reduction="none")
    wanted = [hidden, head.weight] if trainable else [hidden]
    expected = torch.autograd.grad((plain * scales).sum() * 3, wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "CHUNK_LOGITS_CPU", chunk)
        total, losses, hits = head(hidden, targets, scales)
        found = torch.autograd.grad(total * 3, wanted)
    torch.testing.assert_close(losses, plain)
    assert not losses.requires_grad
    assert torch.equal(hits, (hidden @ head.weight.T).argmax(dim=1) == targets)
    torch.testing.assert_close(total, (plain * scales).sum())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_stays_close_to_float32(autocast):
    torch.manual_seed(0)
    head = LanguageModelHead(64, 500, bias=False)
    hidden = torch.randn(50, 64)
    targets, scales = torch.randint(500, (50,)), torch.full((50,), 1 / 50)
    expected, *_ = head(hidden, targets, scales)
    if not autocast:
        head, hidden = head.to(torch.bfloat16), hidden.to(torch.bfloat16)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, *_ = head(hidden, targets, scales)
    total.backward()
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=2e-3)
    assert hidden.grad.dtype == hidden.dtype
    assert head.weight.grad.dtype == head.weight.dtype


def test_an_evaluation_makes_no_gradients(monkeypatch):
    wanted = []
    chunked_losses = loss_module.chunked_losses

    def watched(*arguments):
        wanted.append(arguments[-2:])
        return chunked_losses(*arguments)

    monkeypatch.setattr(loss_module, "chunked_losses", watched)
    head = LanguageModelHead(4, 9, bias=False)
    batch = torch.randn(3, 4), torch.tensor([1, 2, 3]), torch.ones(3)
    with torch.no_grad():
        head(*batch)
    head(*batch)
    assert wanted == [(False, False), (True, True)]


def test_extreme_logits_give_finite_losses():
    head = LanguageModelHead(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[300.0], [0.0], [-300.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    total, losses, _ = head(hidden, torch.tensor([2]), torch.ones(1))
    total.backward()
    assert losses.tolist() == [600.0]
    assert hidden.grad.item() == pytest.approx(600.0)


def test_logits_never_exist_for_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS_CPU", 10_000)
    head = LanguageModelHead(4, 5_000, bias=False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    hidden = torch.randn(400, 4, requires_grad=True)
    with Watch():
        total, *_ = head(hidden, torch.randint(5_000, (400,)), torch.ones(400))
        total.backward()
    assert largest <= 20_000  # the head's weight; full logits would be 2,000,000


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    shift=st.integers(1, 8),
)
def test_targets_stay_inside_their_document(lengths, shift):
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    labels = torch.arange(documents.shape[1])[None]
    targets = shifted_targets(labels, documents, shift)
    for t, target in enumerate(targets[0].tolist()):
        ahead = t + shift
        inside = ahead < labels.shape[1] and documents[0, ahead] == documents[0, t]
        assert target == (ahead if inside else -100)
