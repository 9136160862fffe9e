"""MCTPCache under transformers' cache operations: the heads come along, or the operation is refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vita_audio.models import MCTPCache

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
PROMPT = torch.tensor([[5, 91, 17, 402, 33, 250, 8, 77, 120, 64]])
TURN = torch.tensor([[9, 8, 7, 300, 41]])
MODES = [[1, 3, 2, 2], [1, 1], [1, 10]]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").eval()


def generate(model, ids, mode, **kwargs):
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), mtp_inference_mode=mode, **options | kwargs
    )


def forward(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_generation_continues_a_cache_that_plain_forwards_have_filled(model, mode):
    cache = MCTPCache(model.config)
    forward(model, PROMPT[:, :4], cache)
    forward(model, PROMPT[:, 4:7], cache)
    assert generate(model, PROMPT, mode, past_key_values=cache).equal(generate(model, PROMPT, mode))


def test_a_plain_forward_between_two_turns_keeps_the_heads_in_step(model):
    cache = MCTPCache(model.config)
    first = generate(model, PROMPT, MODES[0], past_key_values=cache)
    both = torch.cat([first, TURN], dim=1)
    forward(model, both[:, cache.get_seq_length() : -1], cache)
    assert generate(model, both, MODES[0], past_key_values=cache).equal(generate(model, both, MODES[0]))


def test_a_cache_that_the_backbone_alone_has_filled_is_refused_in_one_line(model):
    cache = MCTPCache(model.config)
    with torch.no_grad():
        model.model(PROMPT[:, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="holds 4 positions, its heads have seen 0") as error:
        generate(model, PROMPT, MODES[0], past_key_values=cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("removed", [0, 1, 2, 5, 12, 17])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_answer_can_be_generated_again_after_a_crop(model, mode, removed):
    cache = MCTPCache(model.config)
    first = generate(model, PROMPT, mode, past_key_values=cache)
    length = cache.get_seq_length() - removed
    cache.crop(-removed)
    assert cache.get_seq_length() == length
    other = torch.cat([first[:, :length], TURN], dim=1)
    second = generate(model, other, mode, past_key_values=cache)
    assert second.equal(generate(model, other, mode))
    # and once more, to go on from what the second answer has left
    cache.crop(-3)
    third = torch.cat([second[:, : cache.get_seq_length()], TURN], dim=1)
    assert generate(model, third, mode, past_key_values=cache).equal(generate(model, third, mode))


def test_a_prompt_that_the_cache_already_holds_is_refused_in_one_line(model):
    cache = MCTPCache(model.config)
    generate(model, PROMPT, MODES[0], past_key_values=cache)
    with pytest.raises(ValueError, match=r"^[^\n]*crop[^\n]*$"):
        generate(model, PROMPT, MODES[0], past_key_values=cache)
    cache.crop(PROMPT.shape[1] - 1 - cache.get_seq_length())
    assert generate(model, PROMPT, MODES[0], past_key_values=cache).equal(generate(model, PROMPT, MODES[0]))


@pytest.mark.parametrize("kind", [MCTPCache, DynamicCache])
@pytest.mark.parametrize("length", [10, 3])
def test_a_prompt_shorter_than_its_cache_is_refused_by_every_loop(model, kind, length):
    cache = kind(config=model.config)
    generate(model, PROMPT, "vanilla", past_key_values=cache)
    held = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"already holds {held} positions and the prompt has {length};[^\n]+$"
    ):
        generate(model, PROMPT[:, :length], "vanilla", past_key_values=cache)
    assert cache.get_seq_length() == held


def test_a_plain_forward_after_a_crop_has_the_same_positions(model):
    cache = MCTPCache(model.config)
    ids = generate(model, PROMPT, MODES[0], past_key_values=cache)
    cache.crop(-4)
    rest = forward(model, ids[:, cache.get_seq_length() :], cache)
    with torch.no_grad():
        whole = model(ids).logits
    torch.testing.assert_close(rest.logits, whole[:, -rest.logits.shape[1] :], rtol=1e-4, atol=1e-4)


def test_a_reset_cache_is_as_good_as_new(model):
    cache = MCTPCache(model.config)
    generate(model, TURN, MODES[0], past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, PROMPT, MODES[0], past_key_values=cache).equal(generate(model, PROMPT, MODES[0]))


@pytest.mark.parametrize(
    ("operation", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ],
    ids=["reorder", "repeat", "select"],
)
@pytest.mark.parametrize("cropped", [False, True])
def test_rows_move_with_their_heads(model, operation, rows, cropped):
    cache = MCTPCache(model.config)
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    first = generate(model, prompts, MODES[0], past_key_values=cache)
    operation(cache)
    if cropped:
        cache.crop(-6)
    kept = first[rows][:, : cache.get_seq_length()]
    ids = torch.cat([kept, TURN.expand(len(rows), -1)], dim=1)
    assert generate(model, ids, MODES[0], past_key_values=cache).equal(generate(model, ids, MODES[0]))


def test_a_cache_initialized_early_or_moved_by_layers_works_like_any_other(model):
    config = model.config
    cache = MCTPCache(config)
    head_size = config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, config.num_key_value_heads, head_size, torch.float32, torch.device("cpu"))
    cache.activate_past_recording()
    first = generate(model, PROMPT, MODES[0], past_key_values=cache)
    assert first.equal(generate(model, PROMPT, MODES[0]))
    for layer in range(config.num_backbone_layers):
        cache.offload(layer)
    ids = torch.cat([first, TURN], dim=1)
    assert generate(model, ids, MODES[0], past_key_values=cache).equal(generate(model, ids, MODES[0]))


@pytest.mark.parametrize("operation", ["update_conv_state", "update_recurrent_state", "update_indexer"])
def test_states_that_the_model_does_not_support_are_refused(model, operation):
    cache = MCTPCache(model.config)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        getattr(cache, operation)(torch.zeros(1), 0)


def test_beam_search_with_such_a_cache_keeps_its_rows_in_step(model):
    cache, beams = MCTPCache(model.config), {"num_beams": 3, "num_return_sequences": 3}
    found = generate(model, PROMPT, [8192, 0], past_key_values=cache, **beams)
    assert found.equal(generate(model, PROMPT, [8192, 0], **beams))
    cache.check()
    assert cache.heads[0].length == cache.get_seq_length()


def test_a_window_that_has_dropped_positions_refuses_a_crop_and_further_use(windowed):
    cache = MCTPCache(windowed.config)
    first = generate(windowed, PROMPT, [1, 1], past_key_values=cache)
    with pytest.raises((RuntimeError, ValueError), match="activate_past_recording"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="its heads have seen"):
        generate(windowed, torch.cat([first, TURN], dim=1), [1, 1], past_key_values=cache)


def test_a_cache_with_another_number_of_rows_is_refused_in_one_line(model):
    cache = MCTPCache(model.config)
    first = generate(model, PROMPT, MODES[0], past_key_values=cache)
    both = torch.cat([first, TURN], dim=1)
    with pytest.raises(ValueError, match=r"^MCTPCache: it holds 1 rows, the input has 2[^\n]+$"):
        generate(model, both.repeat(2, 1), MODES[0], past_key_values=cache)
    assert generate(model, both, MODES[0], past_key_values=cache).equal(generate(model, both, MODES[0]))
