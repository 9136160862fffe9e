"""The training forward against the golden numbers, and properties beyond them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import vita_audio  # noqa: F401
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM, freeze_backbone, is_head_parameter

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"
EXPECTED = json.loads((GOLDENS / "training_expected.json").read_text())


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").train()


@pytest.fixture(scope="module")
def golden():
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / "training_batch.npz").items()}


def row(golden):
    return {name: golden[name] for name in ("input_ids", "position_ids", "labels")}


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return Qwen2MTPForCausalLM(Qwen2MTPConfig(**sizes | changes)).train()


def random_row(lengths=(9, 1, 2, 14, 3), vocabulary=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def gradient_norms(model):
    return {
        name: parameter.grad.norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_backbone_logits_equal_the_golden_ones(model, golden):
    logits = model(golden["input_ids"], position_ids=golden["position_ids"]).logits
    torch.testing.assert_close(logits, golden["main_logits"].float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["joint", "joint_num_items", "frozen_llm"])
def test_losses_and_gradients_equal_the_golden_ones(model, golden, case, checkpointing):
    if case == "frozen_llm":
        freeze_backbone(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = EXPECTED[case]
    output = model(**row(golden), num_items_in_batch=expected.get("num_items_in_batch"))
    output.loss.backward()
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert output.mtp_losses.tolist() == pytest.approx(expected["head_losses"], rel=1e-5)
    assert not output.mtp_losses.requires_grad
    if "grad_norms" in expected:
        assert gradient_norms(model) == pytest.approx(expected["grad_norms"], rel=1e-4)


def test_one_document_without_position_ids_equals_the_golden_loss(model, golden):
    expected = EXPECTED["single_document"]
    start = slice(0, expected["length"])
    output = model(golden["input_ids"][:, start], labels=golden["labels"][:, start])
    assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert output.mtp_losses.tolist() == pytest.approx(expected["head_losses"], rel=1e-5)


def test_the_loss_of_a_packed_row_is_that_of_its_documents():
    model = tiny(mtp_loss_weight=0.7)
    batch = random_row()
    together = model(**batch, num_items_in_batch=10).loss
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    alone = 0.0
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        document = {name: tensor[:, start:end] for name, tensor in batch.items()}
        alone += model(**document, num_items_in_batch=10).loss
    torch.testing.assert_close(together, alone)


def test_losses_equal_full_logits_computed_token_by_token_of_each_document():
    """The definition of the SPEC, written down without packing: loops over documents and heads."""
    model = tiny()
    batch = random_row()
    sums, counts = torch.zeros(4), torch.zeros(4)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][0, start:end]
        n = ids.shape[1]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for term in range(4):
            if term:
                k = term - 1
                inputs = n - k - 1  # t = 0 … n-k-2
                if inputs < 1:
                    break
                positions = torch.arange(k + 1, n)[None]
                embeds = model.get_input_embeddings()(ids[:, k + 1 :])
                hidden = model.heads[k](
                    embeds,
                    hidden[:, :inputs],
                    attention_mask=None,
                    position_embeddings=model.model.rotary_emb(embeds, positions),
                )
            targets = labels[term + 1 :]
            if len(targets):
                logits = model.lm_head(hidden[0, : len(targets)])
                sums[term] += cross_entropy(logits, targets, reduction="sum", ignore_index=-100).detach()
                counts[term] += (targets != -100).sum()
    output = model(**batch)
    torch.testing.assert_close(torch.cat([output.main_loss[None], output.mtp_losses]), sums / counts)


def test_detached_heads_train_only_their_own_and_shared_parameters():
    models = [tiny(mtp_detach_backbone=detach) for detach in (False, True)]
    batch = random_row()
    for each in models:
        each(**batch).loss.backward()
    plain = tiny(num_nextn_predict_layers=0, num_hidden_layers=2)
    plain.load_state_dict(models[1].state_dict(), strict=False)
    plain(**batch).loss.backward()
    main_only = gradient_norms(plain)
    detached, through = gradient_norms(models[1]), gradient_norms(models[0])
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        assert detached[name] == pytest.approx(main_only[name], rel=1e-5)
        assert through[name] != pytest.approx(main_only[name], rel=1e-3)
    for name in ("model.norm.weight", "lm_head.weight"):
        assert detached[name] != pytest.approx(main_only[name], rel=1e-3)


def test_the_frozen_backbone_receives_no_gradient_and_every_head_parameter_does():
    model = freeze_backbone(tiny())
    model(**random_row()).loss.backward()
    assert set(gradient_norms(model)) == {
        name for name, _ in model.named_parameters() if is_head_parameter(model, name)
    }


@pytest.mark.parametrize("items", [None, 0])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_row_without_supervision_gives_a_zero_loss_with_a_backward_pass(frozen, items):
    model = tiny()
    if frozen:
        freeze_backbone(model)
    batch = random_row()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    output = model(**batch, num_items_in_batch=items)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert output.mtp_losses.tolist() == [0.0, 0.0, 0.0]
    assert all(norm == 0.0 for norm in gradient_norms(model).values())


def test_without_heads_the_loss_is_that_of_the_language_model():
    model = tiny(num_nextn_predict_layers=0, num_hidden_layers=2)
    batch = random_row(lengths=(20,))
    logits = model(batch["input_ids"]).logits
    expected = cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected)
    assert output.mtp_losses.shape == (0,)


def test_the_loss_of_padded_rows_is_that_of_each_alone():
    model = tiny()
    rows = [random_row(lengths=(length,), seed=length) for length in (7, 12)]
    alone = sum(model(**each, num_items_in_batch=4).loss for each in rows)
    ids, labels = torch.zeros(2, 12, dtype=torch.long), torch.full((2, 12), -100)
    mask = torch.zeros(2, 12, dtype=torch.long)
    for i, each in enumerate(rows):
        n = each["input_ids"].shape[1]
        ids[i, :n], labels[i, :n], mask[i, :n] = each["input_ids"][0], each["labels"][0], 1
    together = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=4).loss
    torch.testing.assert_close(together, alone)


def test_heads_without_token_ids_are_refused():
    model = tiny()
    embeds = torch.zeros(1, 5, 32)
    with pytest.raises(ValueError, match="also pass input_ids"):
        model(inputs_embeds=embeds, labels=torch.zeros(1, 5, dtype=torch.long))


def test_the_trainer_accumulates_as_one_large_batch_would(tmp_path):
    rows = [{name: tensor[0] for name, tensor in random_row((15, 5), seed=seed).items()} for seed in range(4)]

    def collate(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    weights = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = Trainer(
            model=tiny(),
            args=TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                gradient_checkpointing=True,
                max_steps=2,
                learning_rate=0.1,
                optim="sgd",
                max_grad_norm=0,
                report_to=[],
                save_strategy="no",
                remove_unused_columns=False,
                use_cpu=True,
                disable_tqdm=True,
                seed=1,
            ),
            data_collator=collate,
            train_dataset=rows,
        )
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
