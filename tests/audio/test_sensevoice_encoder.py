"""SenseVoiceEncoder: golden stages, batches, number types, and the forms its weights come in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from vita_audio.audio.sensevoice import SenseVoiceEncoder, SenseVoiceEncoderConfig
from vita_audio.audio.sensevoice.encoder import query_rows, sinusoidal_positions

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"


@pytest.fixture(scope="module")
def golden():
    arrays = {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "encoder.npz").items()}
    arrays["features"] = torch.nn.utils.rnn.pad_sequence(
        [arrays["feats_0"], arrays["feats_1"]], batch_first=True
    )
    return arrays


@pytest.fixture(scope="module")
def encoder():
    return SenseVoiceEncoder.from_pretrained(GOLDENS)


def assert_valid_rows_equal(actual, expected, lengths, atol=1e-4):
    for item, length in enumerate(lengths):
        torch.testing.assert_close(actual[item, :length], expected[item, :length], atol=atol, rtol=0)


def test_outputs_equal_the_golden(golden, encoder):
    output, lengths = encoder(golden["features"], golden["lengths"])
    assert lengths.tolist() == golden["out_lengths"].tolist()
    assert_valid_rows_equal(output, golden["out_f32"], lengths)
    assert_valid_rows_equal(encoder.ctc_log_probs(output), golden["ctc_log_probs"], lengths)


def test_every_stage_equals_the_golden(golden, encoder):
    stages = {}

    def record(name):
        return lambda module, inputs, output: stages.update({name: output})

    stack = encoder.encoder
    first = stack.encoders0[0]
    hooks = [
        encoder.encoder.register_forward_pre_hook(
            lambda module, inputs: stages.update(prompted_input=inputs[0])
        ),
        stack.dropout.register_forward_hook(record("after_pos")),
        first.norm1.register_forward_hook(record("l0_norm1")),
        first.self_attn.register_forward_hook(record("l0_self_attn")),
        first.register_forward_hook(record("l0_out")),
        stack.encoders[-1].register_forward_hook(record("main_out")),
        stack.after_norm.register_forward_hook(record("after_norm")),
        stack.tp_encoders[-1].register_forward_hook(record("tp_out")),
    ]
    _, lengths = encoder(golden["features"], golden["lengths"])
    for hook in hooks:
        hook.remove()
    for name, value in stages.items():
        assert_valid_rows_equal(value, golden[f"stage_{name}"], lengths)


def test_the_memory_of_the_first_block_equals_the_golden(golden, encoder):
    attention = encoder.encoder.encoders0[0].self_attn
    lengths = golden["out_lengths"]
    mask = torch.arange(27) < lengths[:, None]
    value = attention.linear_q_k_v(golden["stage_l0_norm1"]).chunk(3, dim=-1)[2]
    assert_valid_rows_equal(attention.memory(value, mask), golden["stage_l0_fsmn"], lengths)


def test_other_query_rows_give_the_other_golden(golden, encoder):
    assert query_rows() == golden["query_ids_default"].tolist()
    output, lengths = encoder(golden["features"], golden["lengths"], golden["query_ids_alt"].tolist())
    assert_valid_rows_equal(output, golden["out_f32_alt_query"], lengths)


def test_query_rows_follow_language_and_text_form():
    assert query_rows("yue", inverse_text_norm=True) == [7, 1, 2, 14]
    assert query_rows("klingon") == query_rows("auto")


def test_features_rounded_to_bfloat16_give_the_golden_of_the_original_wrapper(golden, encoder):
    rounded = golden["features"].bfloat16().float()
    output, lengths = encoder(rounded, golden["lengths"])
    assert_valid_rows_equal(output, golden["out_f32_from_bf16_rounded_feats"], lengths)


def test_the_position_table_equals_the_golden_in_both_number_types(golden):
    rows = golden["pos_rows"] - 1
    table = sinusoidal_positions(int(rows.max()) + 1, 560, torch.float32)
    torch.testing.assert_close(table[rows], golden["pos_f32"], atol=1e-4, rtol=0)
    coarse = sinusoidal_positions(int(rows.max()) + 1, 560, torch.bfloat16)
    torch.testing.assert_close(coarse[rows].float(), golden["pos_bf16_as_f32"], atol=1e-2, rtol=0)


def test_a_bfloat16_encoder_is_near_its_golden(golden):
    encoder = SenseVoiceEncoder.from_pretrained(GOLDENS, dtype=torch.bfloat16)
    output, lengths = encoder(golden["features"], golden["lengths"])
    assert output.dtype == torch.bfloat16
    assert_valid_rows_equal(output.float(), golden["out_bf16_model_as_f32"], lengths, atol=0.1)


def test_bfloat16_lengths_stay_exact_beyond_256_frames():
    encoder = SenseVoiceEncoder({"output_size": 8, "num_blocks": 1, "tp_blocks": 0, "linear_units": 8})
    _, lengths = encoder.bfloat16()(torch.zeros(2, 301, 560), [301, 259])
    assert lengths.tolist() == [305, 263]


def test_a_batch_of_different_lengths_equals_one_by_one(golden, encoder):
    output, lengths = encoder(golden["features"], golden["lengths"])
    for item, name in enumerate(["feats_0", "feats_1"]):
        alone, alone_lengths = encoder(golden[name][None])
        assert alone_lengths.item() == lengths[item] == alone.shape[1]
        torch.testing.assert_close(output[item, : lengths[item]], alone[0], atol=1e-5, rtol=0)


def test_padding_receives_no_gradient(golden, encoder):
    features = golden["features"].clone().requires_grad_()
    output, lengths = encoder(features, golden["lengths"])
    torch.cat([output[item, :length] for item, length in enumerate(lengths)]).sum().backward()
    assert features.grad[1, 14:].abs().max() == 0
    assert features.grad[1, :14].abs().min() > 0


def test_an_even_kernel_and_a_shift_pad_as_specified():
    settings = {"output_size": 8, "num_blocks": 1, "tp_blocks": 0, "linear_units": 8}
    even = SenseVoiceEncoder({**settings, "kernel_size": 6})
    assert even.encoder.encoders0[0].self_attn.padding == (2, 3)
    shifted = SenseVoiceEncoder({**settings, "kernel_size": 11, "sanm_shfit": 3})
    assert shifted.encoder.encoders0[0].self_attn.padding == (8, 2)


def test_released_names_and_shapes_at_released_sizes():
    manifest = json.loads((GOLDENS / "manifest_sensevoice_small.json").read_text())
    with torch.device("meta"):
        encoder = SenseVoiceEncoder()
    assert {name: list(value.shape) for name, value in encoder.state_dict().items()} == manifest
    assert sum(value.numel() for value in encoder.parameters()) == 233_999_167


@pytest.mark.parametrize("nesting", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.audio_model.model."])
def test_weights_load_from_every_published_nesting_and_prefix(tmp_path, golden, encoder, nesting, prefix):
    weights = {prefix + name: value for name, value in encoder.state_dict().items()}
    torch.save({nesting: weights} if nesting else weights, tmp_path / "model.pt")
    shutil.copy(GOLDENS / "encoder_config.json", tmp_path / "config.json")
    output, lengths = SenseVoiceEncoder.from_pretrained(tmp_path)(golden["features"], golden["lengths"])
    assert_valid_rows_equal(output, golden["out_f32"], lengths)


def test_sizes_are_read_from_funasr_yaml(tmp_path, encoder):
    settings = json.loads((GOLDENS / "encoder_config.json").read_text())
    unstated = {"ctc_vocab_size", "query_embedding_rows", "input_size"}
    conf = {name: value for name, value in settings.items() if name not in unstated}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"encoder": "SenseVoice", "encoder_conf": conf}))
    torch.save(encoder.state_dict(), tmp_path / "model.pt")
    assert SenseVoiceEncoder.from_pretrained(tmp_path).config == encoder.config


def test_a_saved_encoder_reads_back_equal(tmp_path, encoder):
    encoder.save_pretrained(tmp_path)
    read = SenseVoiceEncoder.from_pretrained(tmp_path)
    assert read.config == encoder.config
    assert all(
        torch.equal(value, load_file(GOLDENS / "encoder_weights.safetensors")[name])
        for name, value in read.state_dict().items()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_layer": "conv2d"}, "input_layer"),
        ({"normalize_before": False}, "normalize_before"),
        ({"output_size": 30}, "attention_heads"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_another_network_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SenseVoiceEncoderConfig.from_dict(settings)


def test_a_folder_without_weights_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.pt"):
        SenseVoiceEncoder.from_pretrained(tmp_path)
    torch.save({"layer.weight": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a SenseVoice encoder"):
        SenseVoiceEncoder.from_pretrained(tmp_path)


def test_weights_of_other_sizes_are_refused(tmp_path, encoder):
    torch.save(encoder.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="do not fit"):
        SenseVoiceEncoder.from_pretrained(tmp_path)
