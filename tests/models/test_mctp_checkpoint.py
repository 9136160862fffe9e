"""Folders in, folders out: released names, growth, and folders that cannot serve."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

import vita_audio  # noqa: F401
from vita_audio.models import (
    CheckpointError,
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    load_with_heads,
    resize_vocabulary,
)

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "mctp"
MANIFESTS = json.loads((GOLDENS / "released_key_manifest.json").read_text())
SIZES = sorted((ROOT / "configs" / "models").glob("qwen2.5_*.json"))
IDS = torch.arange(3, 40)[None]


def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=["whole", "sharded"])
def plain(request, tmp_path, save_qwen2):
    """A plain Qwen2 of three layers, in one file or several."""
    size = "40KB" if request.param == "sharded" else "1GB"
    return save_qwen2(tmp_path / "plain", max_shard_size=size, num_hidden_layers=3)


def assert_same(first, second):
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def head_parts(model, k):
    layer = model.model.layers[model.config.num_backbone_layers + k]
    return layer, model.mtp_projs[k], model.mtp_embed_norms[k], model.mtp_hidden_norms[k]


@pytest.mark.parametrize("heads", [1, 10])
def test_the_released_7b_names_and_shapes_are_ours(heads):
    config = AutoConfig.from_pretrained(ROOT / "configs" / "models" / f"qwen2.5_7b_mtp{heads}.json")
    assert shapes(meta_model(config)) == MANIFESTS[f"qwen2_mtp_7b_mtp{heads}"]


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_every_size_in_configs_is_a_qwen2_5_with_heads_added(path):
    config = AutoConfig.from_pretrained(path)
    assert config.num_nextn_predict_layers == int(path.stem.rsplit("mtp")[1])
    model = meta_model(config)
    heads = config.num_nextn_predict_layers
    own = sum(
        tensor.numel() for k in range(heads) for part in head_parts(model, k) for tensor in part.parameters()
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    # Published parameter counts without embeddings, in billions.
    published = {"0.5b": 0.36, "1.5b": 1.31, "3b": 2.77, "7b": 6.53}[path.stem.split("_")[1]]
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert (total - own - embeddings) / 1e9 == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_every_size_in_configs_has_the_rotary_embedding_of_qwen2_5(path):
    config = AutoConfig.from_pretrained(path)
    assert config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}
    head_size = config.hidden_size // config.num_attention_heads
    expected = 1e6 ** (-torch.arange(0, head_size, 2) / head_size)
    torch.testing.assert_close(Qwen2RotaryEmbedding(config).inv_freq, expected)


def test_there_are_twelve_sizes():
    assert len(SIZES) == 12


@pytest.mark.parametrize("shard", ["1GB", "300KB"])
def test_saving_keeps_every_name_and_bit(tmp_path, shard):
    AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint").save_pretrained(
        tmp_path, max_shard_size=shard
    )
    saved = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    original = load_file(GOLDENS / "checkpoint" / "model.safetensors")
    assert set(saved) == set(original)
    assert all(torch.equal(saved[name], original[name]) for name in original)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.mtp_inference_mode == [1, 3]
    assert again.config.num_nextn_predict_layers == 3
    assert_same(again, AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint"))


def test_old_and_new_configuration_files_mean_the_same(tmp_path):
    old = AutoConfig.from_pretrained(GOLDENS / "checkpoint")
    assert "rope_theta" in json.loads((GOLDENS / "checkpoint" / "config.json").read_text())
    old.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    new = AutoConfig.from_pretrained(tmp_path)
    assert new.rope_parameters["rope_theta"] == old.rope_parameters["rope_theta"] == 1e6
    assert new.num_backbone_layers == old.num_backbone_layers == 4


def test_heads_grow_from_the_last_layer_of_a_plain_model(plain, caplog):
    with caplog.at_level(logging.INFO):
        model = load_with_heads(plain, 3)
    assert "backbone layer 2: heads 0, 1, 2" in caplog.text
    for k in range(3):
        layer, proj, embed_norm, hidden_norm = head_parts(model, k)
        assert_same(layer, model.model.layers[2])
        assert 0.015 < proj.weight.std() < 0.025  # initializer_range
        assert torch.all(embed_norm.weight == 1)
        assert torch.all(hidden_norm.weight == 1)
    assert not torch.equal(model.mtp_projs[0].weight, model.mtp_projs[1].weight)
    backbone = Qwen2ForCausalLM.from_pretrained(plain)
    assert torch.equal(model(IDS).logits, backbone(IDS).logits)


def test_ten_heads_grow_from_one_by_copying_the_head_before(plain, tmp_path, caplog):
    one = load_with_heads(plain, 1)
    with torch.no_grad():
        for part in head_parts(one, 0):
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter))
    one.save_pretrained(tmp_path / "one")
    with caplog.at_level(logging.INFO):
        ten = load_with_heads(tmp_path / "one", 10)
    assert "head 0: heads 1, 2, 3, 4, 5, 6, 7, 8, 9" in caplog.text
    for k in range(10):
        for part, kept in zip(head_parts(ten, k), head_parts(one, 0), strict=True):
            assert_same(part, kept)
    assert torch.equal(ten(IDS).logits, one(IDS).logits)


def test_nothing_grows_when_nothing_is_missing(caplog):
    model = load_with_heads(GOLDENS / "checkpoint", 3)
    assert "grown" not in caplog.text
    assert_same(model, AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint"))


def test_the_schedule_of_a_trained_model_is_its_default_after_loading(plain, tmp_path):
    model = load_with_heads(plain, 3)
    model.set_default_mode([1, 3, 2, 3])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.mtp_inference_mode == [1, 3, 2, 3]
    with pytest.raises(ValueError, match="pairs M, m"):
        model.set_default_mode([1, 3, 2])


def test_tied_embeddings_stay_tied(tmp_path, save_qwen2):
    save_qwen2(tmp_path / "plain", vocab_size=64, tie_word_embeddings=True)
    model = load_with_heads(tmp_path / "plain", 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert resize_vocabulary(model, 70) == 72
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "grown")
    assert "lm_head.weight" not in load_file(tmp_path / "grown" / "model.safetensors")
    assert torch.equal(load_with_heads(tmp_path / "grown", 2)(IDS).logits, model.eval()(IDS).logits)


def test_the_vocabulary_grows_to_a_multiple_of_eight_and_never_shrinks(plain):
    model = load_with_heads(plain, 1)
    before = model.get_input_embeddings().weight.clone()
    assert resize_vocabulary(model, 50) == 96
    assert resize_vocabulary(model, 97) == 104 == model.config.vocab_size
    assert torch.equal(model.get_input_embeddings().weight[:96], before)
    assert model.lm_head.weight.shape == (104, 32)
    assert torch.isfinite(model(IDS, labels=IDS).loss)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def other_architecture(folder):
    edit_config(folder, model_type="llama")


def drop_shard(folder):
    max(folder.glob("*.safetensors")).unlink()


def cut_shard(folder):
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def empty_shard(folder):
    max(folder.glob("*.safetensors")).write_bytes(b"")


def drop_tensor(folder):
    file = next(
        file
        for file in folder.glob("*.safetensors")
        if "model.layers.1.mlp.up_proj.weight" in load_file(file)
    )
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


def large_tokenizer(folder):
    vocabulary = {f"t{i}": i for i in range(97)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def other_width(folder):
    edit_config(folder, intermediate_size=65)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_config, "config.json: not found"),
        (break_config, "config.json: not valid JSON"),
        (other_architecture, "model_type 'llama' is not a Qwen2"),
        (drop_shard, "weight files are missing"),
        (cut_shard, "truncated"),
        (empty_shard, "not a safetensors file"),
        (drop_tensor, "1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight"),
        (large_tokenizer, "vocab_size 96 is smaller than the 97 tokens"),
        (break_tokenizer, "tokenizer.json: not valid JSON"),
        (break_index, "index.json: not a valid index of weight files"),
        (other_width, "has shape"),
    ],
)
def test_an_unusable_folder_is_refused_in_one_line(plain, damage, message):
    damage(plain)
    with pytest.raises(CheckpointError, match=message) as error:
        load_with_heads(plain, 1)
    assert "\n" not in str(error.value)
    assert str(plain) in str(error.value)


def test_fewer_heads_than_the_folder_holds_are_refused(tmp_path):
    shutil.copytree(GOLDENS / "checkpoint", tmp_path / "three")
    with pytest.raises(CheckpointError, match="ask for at least 3"):
        load_with_heads(tmp_path / "three", 2)
    with pytest.raises(CheckpointError, match="num_heads=-1"):
        load_with_heads(tmp_path / "three", -1)


def test_a_configuration_without_backbone_layers_is_refused():
    with pytest.raises(Exception, match="counts backbone and head layers together"):
        Qwen2MTPConfig(num_hidden_layers=3, num_nextn_predict_layers=3)


def test_the_class_is_a_qwen2():
    assert issubclass(Qwen2MTPForCausalLM, Qwen2ForCausalLM)
