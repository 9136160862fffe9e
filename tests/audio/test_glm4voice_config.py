"""The decoder's configuration is data; weight files are checked."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from vita_audio.audio.glm4voice import FlowDecoder, Vocoder
from vita_audio.audio.glm4voice.config import ConfigError, DecoderConfig, load_decoder_config
from vita_audio.audio.glm4voice.weights import WeightsError
from vita_audio.files import content_fingerprint

DECODER = Path(__file__).parents[1] / "goldens" / "glm4voice" / "decoder"

RELEASED = """
__set_seed1: !apply:random.seed [1986]
__set_seed2: !apply:torch.manual_seed [1986]
sample_rate: 22050
spk_embed_dim: 192
flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: 512
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 16384
    input_frame_rate: 12.5
    only_mask_loss: True
    encoder: !new:cosyvoice.transformer.encoder.BlockConformerEncoder
        output_size: 512
        attention_heads: 8
        linear_units: 2048
        num_blocks: 6
        dropout_rate: 0.1
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'block_rel_selfattn'
        input_size: 512
        use_cnn_module: False
        macaron_style: False
        block_size: 10
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: 80
        sampling_ratios: [1, 1, 1, 1]
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [256, 256]
            dropout: 0
            attention_head_dim: 64
            n_blocks: 4
            num_mid_blocks: 12
            num_heads: 8
            act_fn: 'gelu'
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 512
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 8]
    upsample_kernel_sizes: [16, 16]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: 512
parquet_opener: !name:cosyvoice.dataset.processor.parquet_opener
data_pipeline: [!ref <parquet_opener>]
train_conf:
    optim: adam
"""


def _read(folder: Path, text: str) -> DecoderConfig:
    (folder / "config.yaml").write_text(text)
    return load_decoder_config(folder)


def test_the_released_layout_reads_to_the_released_sizes(tmp_path):
    assert _read(tmp_path, RELEASED) == DecoderConfig()


def test_plain_yaml_and_json_read_alike(tmp_path):
    for name in ("config_plain.yaml", "config.json"):
        (tmp_path / name).mkdir()
        shutil.copy(DECODER / name, tmp_path / name / name)
    assert load_decoder_config(tmp_path / "config_plain.yaml") == load_decoder_config(
        tmp_path / "config.json"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("!apply:random.seed [1986]", "!apply:os.system ['touch owned']", "os.system"),
        ("sample_rate: 22050", "sample_rate: !!python/object/apply:os.getcwd []", "python/object"),
        ("!new:cosyvoice.flow.flow.MaskedDiffWithXvec", "!new:subprocess.Popen", "subprocess.Popen"),
        ("!new:omegaconf.DictConfig", "!new:builtins.exec", "builtins.exec"),
        ("!ref <sample_rate>", "!ref <sample_rate> // 2", "reference"),
        ("!ref <sample_rate>", "!ref <rate>", "'rate'"),
        ("solver: 'euler'", "solver: 'heun'", r"cfm\.solver"),
        ("block_size: 10", "block_sise: 10", r"encoder\.block_sise"),
        ("vocab_size: 16384", "vocab_size: many", r"flow\.vocab_size"),
        ("channels: [256, 256]", "channels: 256", r"estimator\.channels"),
        ("audio_limit: 0.99", "audio_limit: -1", r"hift\.audio_limit"),
        ("in_channels: 320", "in_channels: 160", r"estimator\.in_channels"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 4]", "128 samples per mel frame"),
        ("use_cnn_module: False", "use_cnn_module: True", r"encoder\.use_cnn_module"),
        ("hift: !new", "hifi: !new", "hift"),
    ],
)
def test_any_other_content_is_refused_in_one_line_and_nothing_is_run(
    tmp_path, monkeypatch, old, new, message
):
    monkeypatch.chdir(tmp_path)
    assert old in RELEASED
    with pytest.raises(ConfigError, match=message) as caught:
        _read(tmp_path, RELEASED.replace(old, new, 1))
    assert "\n" not in str(caught.value)
    assert "config.yaml" in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_broken_files_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_decoder_config(tmp_path)
    with pytest.raises(ConfigError, match="mapping"):
        _read(tmp_path, "- 1\n- 2\n")
    with pytest.raises(ConfigError, match="config_plain"):
        load_decoder_config(tmp_path / "nowhere")


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("config.json", "flow.pt", "hift.pt"):
        (tmp_path / name).write_bytes((DECODER / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(("model", "file"), [(FlowDecoder, "flow"), (Vocoder, "hift")])
def test_a_wrong_weight_file_is_refused_with_the_first_differing_key(folder, model, file):
    path = folder / f"{file}.pt"
    state = torch.load(path, weights_only=True)
    key = list(state)[7]
    torch.save({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(WeightsError, match=f"{file}.pt: key '{key}' is missing"):
        model.from_pretrained(folder)
    torch.save(state | {key: torch.zeros(3, 1)}, path)
    with pytest.raises(WeightsError, match=rf"key '{key}' has shape \[3, 1\]"):
        model.from_pretrained(folder)
    torch.save(state | {"extra.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"unexpected key 'extra\.weight'"):
        model.from_pretrained(folder)


@pytest.mark.parametrize("file", ["flow.pt", "flow.safetensors"])
def test_a_truncated_weight_file_is_refused_in_one_line(folder, file):
    (folder / "flow.pt").unlink()
    whole = (DECODER / file).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        (folder / file).write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=file) as caught:
            FlowDecoder.from_pretrained(folder)
        assert "\n" not in str(caught.value)


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_weight_file_cannot_run_code(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"weight": _Trap()}, folder / "flow.pt")
    with pytest.raises(WeightsError, match=r"flow\.pt"):
        FlowDecoder.from_pretrained(folder)
    (folder / "hift.pt").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(WeightsError, match=r"hift\.pt"):
        Vocoder.from_pretrained(folder)
    assert not (folder / "owned").exists()


def test_weights_of_another_size_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["estimator"]["num_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"attn1\.to_q\.weight"):
        FlowDecoder.from_pretrained(folder)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"flow\.safetensors nor flow\.pt"):
        FlowDecoder.from_pretrained(tmp_path)


def test_a_fingerprint_depends_on_content_and_not_on_location(tmp_path):
    for name, byte in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).write_bytes(bytes(300_000) + bytes([byte]))
    a, b, c = (content_fingerprint([tmp_path / name]) for name in "abc")
    assert a == b != c
