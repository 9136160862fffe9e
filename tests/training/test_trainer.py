"""The training loop on batches that the test makes: what is logged, how the optimizer is set up."""

import itertools
import json

import pytest
import torch
from torch.nn import functional

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.training import SpeechTrainer, StageArguments

VOCABULARY, TIME, HEADS = 64, 12, 2


class Batches:
    """An endless loader of given batches."""

    def __init__(self, batches):
        self.batches = batches
        self.handed_out = 0

    def __iter__(self):
        for batch in itertools.cycle(self.batches):
            self.handed_out += 1
            yield dict(batch)

    def state_dict(self):
        return {"handed_out": self.handed_out}

    def counts(self):
        return {"epoch": self.handed_out / len(self.batches)}


def make_model():
    torch.manual_seed(0)
    return Qwen2MTPForCausalLM(
        Qwen2MTPConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2 + HEADS,
            num_nextn_predict_layers=HEADS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )


def make_batch(seed, supervised):
    """One row of which the first ``supervised`` labels count."""
    ids = torch.randint(VOCABULARY, (1, TIME), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, supervised:] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(TIME)[None]}


@pytest.fixture
def make_trainer(tmp_path):
    def make(batches, model=None, **options):
        defaults = {
            "output_dir": str(tmp_path),
            "max_steps": 1,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        arguments = StageArguments(**{**defaults, **options})
        return SpeechTrainer(model=model or make_model(), args=arguments, loader=Batches(batches))

    return make


def logged(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_losses_are_logged_per_supervised_token_however_many_rows_make_a_step(
    make_trainer, accumulation, logging_steps
):
    batches = [make_batch(seed, supervised) for seed, supervised in enumerate((12, 5, 8))]
    trainer = make_trainer(
        batches,
        gradient_accumulation_steps=accumulation,
        logging_steps=logging_steps,
        max_steps=2,
        learning_rate=1e-30,  # the model stays the one that the losses below are computed with
    )
    trainer.train()
    seen = list(itertools.islice(itertools.cycle(batches), 2 * accumulation))
    per_step = [
        expected_losses(make_model(), seen[:accumulation]),
        expected_losses(make_model(), seen[accumulation:]),
    ]
    lines = logged(trainer)
    if logging_steps == 2:
        per_step = [{name: (per_step[0][name] + per_step[1][name]) / 2 for name in per_step[0]}]
    assert len(lines) == len(per_step)
    for line, expected in zip(lines, per_step, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
        heads = sum(expected[f"mtp_loss_{k}"] for k in range(HEADS)) / HEADS
        assert line["loss"] == pytest.approx(expected["main_loss"] + heads, rel=1e-4)


def expected_losses(model, batches):
    """Summed over the rows of a step, divided by their supervised labels."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    totals = {}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            outputs = model(**batch, num_items_in_batch=1)
            own = {"main_loss": outputs.main_loss} | {
                f"mtp_loss_{k}": loss for k, loss in enumerate(outputs.mtp_losses)
            }
            logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits
            by_hand = functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
            torch.testing.assert_close(own["main_loss"], by_hand, rtol=1e-4, atol=1e-4)
            for name, loss in own.items():
                totals[name] = totals.get(name, 0.0) + loss.item() / items
    return totals


def test_the_optimizer_takes_both_betas_epsilon_decay_and_the_heads_rate(make_trainer):
    trainer = make_trainer(
        [make_batch(0, 12)],
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-7,
        weight_decay=0.1,
        learning_rate=1e-3,
        mtp_learning_rate_multiplier=10,
    )
    groups = trainer.create_optimizer().param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.95)}
    assert {group["eps"] for group in groups} == {1e-7}
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (1e-3, 1e-2) for decay in (0.1, 0.0)
    }


def test_without_deepspeed_steps_with_bad_gradients_are_skipped_and_ten_in_a_row_stop_the_run(make_trainer):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer = make_trainer([make_batch(0, 12)], model, max_steps=30, learning_rate=1e-2)
    with pytest.raises(FloatingPointError, match="10 steps in a row, up to step 10"):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_one_bad_step_among_good_ones_loses_only_that_step(make_trainer):
    model, calls = make_model(), itertools.count(1)
    model.lm_head.weight.register_hook(
        lambda gradient: gradient * float("nan") if next(calls) % 3 == 0 else gradient
    )
    trainer = make_trainer([make_batch(0, 12)], model, max_steps=30, learning_rate=1e-2)
    trainer.train()
    losses = [line["loss"] for line in logged(trainer)]
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 1


def test_the_configuration_keeps_the_cache_enabled_for_users_of_the_result(make_trainer):
    assert make_trainer([make_batch(0, 12)]).model.config.use_cache is True


def test_a_trace_shows_the_steps_and_the_waits_for_data(make_trainer, tmp_path):
    make_trainer([make_batch(0, 12)], trace_steps=2, max_steps=6, gradient_accumulation_steps=2).train()
    events = json.loads((tmp_path / "trace-0.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert names.count("step") == 2
    assert names.count("wait for data") == 4, "two rows a step"
