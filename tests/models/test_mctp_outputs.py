"""What forward returns, in which order, and what it does not compute."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM, freeze_backbone, resize_vocabulary

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
IDS = torch.arange(3, 20)[None]


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").eval()


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Qwen2MTPForCausalLM(Qwen2MTPConfig(**sizes | changes))


def test_logits_come_first_and_the_cache_after_them(model):
    output = model(IDS, use_cache=True)
    assert torch.equal(output[0], output.logits)
    assert isinstance(output[1], Cache)
    logits, cache = model(IDS, use_cache=True, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == IDS.shape[1]


def test_the_loss_comes_before_the_logits_and_its_parts_last(model):
    output = model(IDS, labels=IDS, output_hidden_states=True)
    assert list(output) == ["loss", "logits", "hidden_states", "main_loss", "mtp_losses"]
    loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


@pytest.mark.parametrize(
    ("kept", "positions"), [(1, [-1]), (3, [-3, -2, -1]), (torch.tensor([0, 5]), [0, 5]), (0, range(17))]
)
def test_only_the_wanted_logits_are_computed(model, kept, positions):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    logits = model(IDS, logits_to_keep=kept).logits
    assert seen == [len(positions)]
    torch.testing.assert_close(logits, model(IDS).logits[:, list(positions)])


@pytest.mark.parametrize("mode", ["vanilla", [1, 3]], ids=str)
def test_generation_computes_one_row_of_logits_a_token(model, mode):
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    model.generate(IDS, mtp_inference_mode=mode, max_new_tokens=5, eos_token_id=None)
    assert seen == [1] * 5


def test_a_resized_head_keeps_its_weights_when_post_init_runs_again():
    model = tiny()
    resize_vocabulary(model, 70)
    before = model.lm_head.weight.clone()
    model.post_init()
    assert torch.equal(model.lm_head.weight, before)


def test_a_negative_index_of_hidden_states_is_that_of_the_backbone(model):
    everything = model(IDS, output_hidden_states=True).hidden_states
    assert len(everything) == model.config.num_backbone_layers + 1
    if "num_hidden_layers_key" not in vars(model.model._can_record_outputs["hidden_states"]):
        pytest.skip("this transformers selects no hidden states by index")
    selected = model(IDS, output_hidden_states=[-1]).hidden_states
    assert [state is not None for state in selected] == [False] * (len(everything) - 1) + [True]
    assert torch.equal(selected[-1], everything[-1])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_reentrant_checkpoint_trains_the_same_parameters(frozen):
    model = tiny(mtp_detach_backbone=not frozen).train()
    if frozen:
        freeze_backbone(model)
    gradients = []
    for use_reentrant in (None, False, True):
        model.zero_grad()
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert "mtp_projs.0.weight" in gradients[0]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, msg=name)


def test_shifted_labels_are_refused(model):
    with pytest.raises(ValueError, match="shift_labels: pass labels only"):
        model(IDS, labels=IDS, shift_labels=IDS)
