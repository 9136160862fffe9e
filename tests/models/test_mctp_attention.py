"""Documents in one row, for every attention back end that runs on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import vita_audio
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.models.attention import document_ids, group_documents

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
# flex_attention compiles a kernel, which takes a CPU a minute.
FLEX = pytest.param("flex_attention", marks=pytest.mark.slow)
BACK_ENDS = ["packed_sdpa", "sdpa", "eager", FLEX]


def load(implementation):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint", attn_implementation=implementation)
    model.set_attn_implementation(implementation)  # building turns sdpa into packed_sdpa
    return model


@pytest.fixture(scope="module")
def batch():
    golden = np.load(GOLDENS / "training_batch.npz")
    return {name: torch.from_numpy(golden[name]) for name in ("input_ids", "position_ids", "labels")}


@pytest.fixture(scope="module")
def reference(batch):
    model = load("eager").train()
    output = model(**batch)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, gradients


def test_sdpa_becomes_packed_sdpa_when_a_model_is_built():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint", attn_implementation="sdpa")
    assert model.config._attn_implementation == "packed_sdpa"


@pytest.mark.parametrize("implementation", BACK_ENDS)
def test_every_back_end_gives_the_same_losses_and_gradients(implementation, batch, reference):
    expected, gradients = reference
    model = load(implementation).train()
    # FlexAttention has no backward pass on a CPU and asks for no gradient there.
    with_gradients = implementation != "flex_attention"
    with torch.set_grad_enabled(with_gradients):
        output = model(**batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(output.mtp_losses, expected.mtp_losses, rtol=1e-4, atol=0)
    if with_gradients:
        output.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("implementation", BACK_ENDS)
def test_documents_in_one_row_do_not_see_each_other(implementation, batch):
    """Changing one document moves no other document's logits or head states by a single bit."""
    model = load(implementation)
    ids, positions = batch["input_ids"], batch["position_ids"]
    documents = document_ids(positions)
    states = []
    with torch.no_grad():
        for changed_ids in (ids, torch.where(documents == 1, (ids + 17) % 640, ids)):
            hidden = model.model(
                input_ids=changed_ids, position_ids=positions, use_cache=False
            ).last_hidden_state
            logits = model(changed_ids, position_ids=positions).logits
            masks = vita_audio.models.attention.attention_masks(model.config, hidden, None, None, positions)
            heads = model.head_states(changed_ids, hidden, positions, masks)
            states.append([logits, *heads])
    lengths = torch.bincount(documents[0])
    for shift, (before, after) in enumerate(zip(*states, strict=True)):
        # Head k's last k+1 places of a document hold nothing: they are never used.
        used = positions < lengths[documents] - shift
        untouched = used & (documents != 1)
        assert torch.equal(before[untouched], after[untouched])
        assert not torch.equal(before[used & (documents == 1)], after[used & (documents == 1)])


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_grouped_documents_cover_every_position_once_and_in_order(rows):
    time = max(sum(row) for row in rows)
    rows = [[*row, time - sum(row)] if sum(row) < time else row for row in rows]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    grouped = group_documents(positions)
    if grouped is None:
        assert all(len(row) == 1 for row in rows)
        return
    flat = torch.cat([group.flatten() for group in grouped.groups])
    assert torch.equal(flat[grouped.restore], torch.arange(positions.numel()))
    assert len(flat) < 2 * positions.numel()
    found = set()
    for group in grouped.groups:
        for document in group:
            length = 1 + int((document.diff() == 1).sum())
            assert torch.equal(document[:length], document[0] + torch.arange(length))
            found.add((int(document[0]), length))
    starts = torch.tensor([length for row in rows for length in row]).cumsum(0)
    expected = zip([0, *starts.tolist()], [length for row in rows for length in row], strict=False)
    assert found == set(expected)


@pytest.mark.parametrize("implementation", ["packed_sdpa", "sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
def test_layers_with_a_window_see_nothing_beyond_it(windowed, implementation, packed):
    windowed.set_attn_implementation(implementation)
    torch.manual_seed(1)
    hidden = torch.randn(1, 12, 32)
    changed = hidden.clone()
    changed[:, 0] += 1
    positions = torch.cat([torch.arange(9), torch.arange(3)])[None] if packed else torch.arange(12)[None]
    masks = vita_audio.models.attention.attention_masks(windowed.config, hidden, None, None, positions)
    for index, reach in enumerate([9 if packed else 12, 4, 4]):
        with torch.no_grad():
            before, after = (
                windowed.model.layers[index](
                    states,
                    attention_mask=masks[windowed.config.layer_types[index]],
                    position_ids=positions,
                    position_embeddings=windowed.model.rotary_emb(states, positions),
                )
                for states in (hidden, changed)
            )
        seen = (before != after).any(dim=-1)[0].tolist()
        assert seen == [position < reach for position in range(12)], index


def test_a_window_holds_for_backbone_and_heads_in_training_and_generation(windowed):
    windowed.set_attn_implementation("packed_sdpa")
    ids = torch.randint(0, 512, (1, 14), generator=torch.Generator().manual_seed(0))
    full = Qwen2MTPForCausalLM(
        Qwen2MTPConfig(**windowed.config.to_dict() | {"use_sliding_window": False, "layer_types": None})
    )
    full.load_state_dict(windowed.state_dict())
    with torch.no_grad():
        window_losses, full_losses = (model(ids, labels=ids) for model in (windowed, full.eval()))
    assert not torch.isclose(window_losses.main_loss, full_losses.main_loss)
    options = {"max_new_tokens": 12, "mtp_inference_mode": [1, 1], "eos_token_id": None, "do_sample": False}
    cached = windowed.generate(ids, **options)
    assert cached.equal(windowed.generate(ids, use_cache=False, **options))
