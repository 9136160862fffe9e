"""Opening a model by path or name: what is found, what is refused, and that nothing uses the network."""

import json
import shutil
import socket

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from vita_audio.models import (
    CheckpointError,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceForCausalLM,
    load_with_heads,
    open_config,
    open_model,
    open_tokenizer,
)

IDS = torch.arange(3, 40)[None]
BOTH = [open_model, lambda path: load_with_heads(path, 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_qwen2):
    return save_qwen2(tmp_path_factory.mktemp("made"))


@pytest.fixture
def plain(made, tmp_path):
    return shutil.copytree(made, tmp_path / "plain")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test."""

    def refuse(*args, **kwargs):
        pytest.fail("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


def put_into(hub_cache, folder, owner="acme", name="tiny"):
    """A model in the cache, laid out as huggingface_hub downloads it: links from a snapshot to blobs."""
    repository = hub_cache / f"models--{owner}--{name}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = shutil.copy(file, repository / "blobs" / f"{number:040d}")
        (snapshot / file.name).symlink_to(blob)
    return snapshot


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(open_folder, path):
    """The message of a refusal, which must be one line."""
    with pytest.raises(CheckpointError) as error:
        open_folder(path)
    message = str(error.value)
    assert "\n" not in message
    return message


# -- opening ----------------------------------------------------------------------------------------------


def test_a_plain_qwen2_opens_for_inference_as_a_model_without_heads(plain):
    model = open_model(plain, dtype="float32", attn_implementation="eager", device="cpu")
    assert type(model) is Qwen2MTPForCausalLM
    assert model.config.num_nextn_predict_layers == 0
    assert not model.training
    other = Qwen2ForCausalLM.from_pretrained(plain, attn_implementation="eager")
    assert torch.equal(model(IDS).logits, other(IDS).logits)


def test_a_trained_model_opens_as_transformers_opens_it(plain, tmp_path):
    trained = load_with_heads(plain, 2, dtype=torch.bfloat16)
    trained.set_default_mode([1, 2])
    trained.save_pretrained(tmp_path / "trained")
    model = open_model(str(tmp_path / "trained"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.mtp_inference_mode == [1, 2]
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_a_plus_model_opens_with_its_audio_encoder_and_its_configuration_says_so(
    sensevoice_checkpoint, plain
):
    model = open_model(sensevoice_checkpoint)
    assert type(model) is Qwen2MTPSenseVoiceForCausalLM
    assert model.config.continuous_input
    assert open_config(sensevoice_checkpoint).continuous_input
    assert not load_with_heads(plain, 1).config.continuous_input


def test_a_folder_saved_with_the_cache_switched_off_opens_with_it_on(plain, tmp_path):
    trained = load_with_heads(plain, 1)
    trained.config.use_cache = False
    trained.save_pretrained(tmp_path / "trained")
    assert open_model(tmp_path / "trained").config.use_cache
    assert load_with_heads(tmp_path / "trained", 1).config.use_cache


# -- paths and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("open_folder", [*BOTH, open_config, open_tokenizer])
@pytest.mark.parametrize(
    "path", ["ouput/stage4", "stage4", "./ouput/stage4", "a/b/c", "../stage4", "/no/stage4"]
)
def test_a_path_that_is_not_a_folder_is_refused_by_name(open_folder, path, tmp_path, monkeypatch, hub_cache):
    monkeypatch.chdir(tmp_path)
    message = refusal(open_folder, path)
    assert message.startswith(f"{path}: no such folder")


def test_a_misspelt_folder_next_to_others_is_not_taken_for_a_hub_name(
    tmp_path, monkeypatch, hub_cache, plain
):
    put_into(hub_cache, plain, "output", "stage3")
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal(open_model, "output/stage3") == f"output/stage3: no such folder in {tmp_path}"


def test_a_file_is_refused_as_a_folder(plain):
    assert "give the folder that holds it" in refusal(open_model, plain / "model.safetensors")


def test_a_name_opens_from_the_local_cache_alone(hub_cache, plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_into(hub_cache, plain)
    opened = open_model("acme/tiny")
    assert torch.equal(opened(IDS).logits, open_model(plain)(IDS).logits)
    assert load_with_heads("acme/tiny", 2).config.num_nextn_predict_layers == 2
    message = refusal(open_model, "acme/other")
    assert "no such model in the Hugging Face cache" in message
    assert "hf://acme/other" in message


def test_an_interrupted_download_is_refused_like_any_incomplete_folder(
    hub_cache, plain, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    snapshot = put_into(hub_cache, plain)
    (snapshot / "model.safetensors").unlink()
    assert "weight files are missing" in refusal(open_model, "acme/tiny")


def test_a_prefix_asks_the_hub(hub_cache, plain, monkeypatch):
    asked = []

    def download(repository, revision=None, **kwargs):
        asked.append((repository, revision))
        return str(plain)

    monkeypatch.setattr("vita_audio.models.open.snapshot_download", download)
    open_config("hf://acme/tiny")
    open_config("hf://acme/tiny@v2")
    assert asked == [("acme/tiny", None), ("acme/tiny", "v2")]


@pytest.mark.parametrize("name", ["hf://", "hf://acme", "hf://acme/tiny/more"])
def test_a_prefix_without_a_name_is_refused(name, hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(open_model, name).startswith(f"{name}: cannot be downloaded")


# -- weights ----------------------------------------------------------------------------------------------


def rewrite(folder, **changes):
    """Change tensors of the only weight file; None drops one."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder):
    model = Qwen2ForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("open_folder", BOTH)
def test_a_tied_head_that_differs_from_the_embedding_is_refused(open_folder, plain):
    edit(plain / "config.json", tie_word_embeddings=True)
    message = refusal(open_folder, plain)
    assert "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight" in message


@pytest.mark.parametrize("open_folder", BOTH)
def test_a_tied_head_stored_twice_is_accepted(open_folder, plain):
    edit(plain / "config.json", tie_word_embeddings=True)
    rewrite(
        plain,
        **{"lm_head.weight": load_file(plain / "model.safetensors")["model.embed_tokens.weight"].clone()},
    )
    model = open_folder(plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize("said", [False, None])
def test_an_untied_head_that_the_weights_lack_is_refused(open_folder, plain, said):
    rewrite(plain, **{"lm_head.weight": None})
    edit(plain / "config.json", tie_word_embeddings=said)
    if said is None:
        config = json.loads((plain / "config.json").read_text())
        del config["tie_word_embeddings"]
        (plain / "config.json").write_text(json.dumps(config))
    assert "the weights hold no lm_head.weight" in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
def test_complete_weights_next_to_an_index_are_refused(open_folder, plain):
    kept = (plain / "model.safetensors").read_bytes()
    shard(plain)
    (plain / "model.safetensors").write_bytes(kept)
    assert "holds two sets of weights" in refusal(open_folder, plain)


def test_an_index_of_the_single_file_is_not_a_second_set(plain):
    names = dict.fromkeys(load_file(plain / "model.safetensors"), "model.safetensors")
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    open_model(plain)


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize("whole", [True, False])
def test_shards_left_over_from_another_save_are_refused(open_folder, plain, whole):
    if not whole:
        shard(plain)
    shutil.copy(next(plain.glob("*.safetensors")), plain / "model-00007-of-00009.safetensors")
    assert "left over from another save, the first is model-00007-of-00009" in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
def test_shards_without_their_index_are_refused(open_folder, plain):
    shard(plain)
    (plain / "model.safetensors.index.json").unlink()
    assert "weight files without model.safetensors.index.json" in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
def test_pickled_weights_are_refused_with_the_way_to_convert_them(open_folder, plain):
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    message = refusal(open_folder, plain)
    assert "weights in pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_to_fp32.py", "a DeepSpeed checkpoint without model.safetensors"),
        ("weights-q4.gguf", "no model.safetensors, but weights-q4.gguf"),
        ("consolidated.safetensors", "no model.safetensors, but consolidated.safetensors"),
        ("README.md", "1 of 1 weight files are missing"),
    ],
)
def test_a_folder_without_weights_is_refused_with_what_it_holds_instead(open_folder, plain, name, message):
    (plain / "model.safetensors").rename(plain / name)
    assert message in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize("whole", [True, False])
def test_a_lora_adapter_is_refused_naming_its_base(open_folder, plain, whole):
    if not whole:
        for file in plain.iterdir():
            file.unlink()
    (plain / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/base"}))
    assert "a LoRA adapter of acme/base" in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
def test_tensors_that_do_not_belong_to_the_configuration_are_refused(open_folder, plain, tmp_path):
    load_with_heads(plain, 1).save_pretrained(tmp_path / "one")
    edit(plain / "config.json", model_type="qwen2_mtp")
    shutil.copy(plain / "config.json", tmp_path / "one")
    assert "do not belong to the model of config.json" in refusal(open_folder, tmp_path / "one")


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"\x02" + bytes(7) + b"[]", "not a safetensors file"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(open_folder, plain, content, message):
    (plain / "model.safetensors").write_bytes(content)
    assert message in refusal(open_folder, plain)


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_nextn_predict_layers": 9, "model_type": "qwen2_mtp"},
            "counts backbone and head layers together",
        ),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(open_folder, plain, changes, message):
    edit(plain / "config.json", **changes)
    assert message in refusal(open_folder, plain)


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_configuration_that_is_not_an_object_is_refused(plain, content):
    (plain / "config.json").write_text(content)
    assert "config.json: not " in refusal(open_config, plain)


# -- generation config, tokenizer, machine ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_sampling_fields_with_greedy_search_are_dropped_with_a_warning_and_the_model_saves(
    plain, tmp_path, caplog, name
):
    (plain / "generation_config.json").write_text("{}")
    edit(plain / name, do_sample=False, temperature=0.6, top_p=0.9, max_new_tokens=7)
    if name == "config.json":  # where older folders keep them
        (plain / "generation_config.json").unlink()
    model = load_with_heads(plain, 1)
    assert "temperature, top_p have no effect without do_sample and are dropped" in caplog.text
    model.set_default_mode([1, 1])
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["max_new_tokens"] == 7
    assert "temperature" not in kept


def test_sampling_fields_of_a_sampling_configuration_are_kept(plain, tmp_path, caplog):
    file = plain / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.05}))
    model = load_with_heads(plain, 1)
    assert "dropped" not in caplog.text
    model.save_pretrained(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["repetition_penalty"]) == (0.6, 1.05)


@pytest.mark.parametrize("open_folder", BOTH)
@pytest.mark.parametrize(
    "content",
    ['{"max_new_tokens": -1}', '{"pad_token_id": -1}', '{"num_return_sequences": 4}', "{", "[]"],
)
def test_a_generation_configuration_that_cannot_be_saved_is_refused(open_folder, plain, content):
    (plain / "generation_config.json").write_text(content)
    assert refusal(open_folder, plain).startswith(str(plain / "generation_config.json"))


def test_a_folder_without_a_tokenizer_is_refused(plain):
    assert "no tokenizer.json" in refusal(open_tokenizer, plain)
    (plain / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be read" in refusal(open_tokenizer, plain)


@pytest.mark.parametrize("attention", ["flash_attention_2", "fastest"])
@pytest.mark.parametrize(
    "open_folder", [open_model, lambda path, **kwargs: load_with_heads(path, 1, **kwargs)]
)
def test_a_missing_attention_back_end_is_refused_in_one_line(open_folder, plain, attention):
    with pytest.raises(CheckpointError, match=rf"^attn_implementation='{attention}': [^\n]+$"):
        open_folder(plain, attn_implementation=attention)


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "cpu:0:1", "meta", "hpu"])
def test_a_missing_device_is_refused_in_one_line_before_the_model_loads(plain, device, monkeypatch):
    monkeypatch.setattr("vita_audio.models.open._open", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=rf"^device '{device}': [^\n]+$"):
        open_model(plain, device=device)
