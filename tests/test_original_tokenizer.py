"""vita_audio.tokenizer: codecs under the original's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from vita_audio.audio.sensevoice.frontend import write_cmvn
from vita_audio.tokenizer import get_audio_tokenizer

ROLE_TABLE = json.loads(
    (Path(__file__).parent / "goldens" / "sensevoice" / "apply_to_role.json").read_text(encoding="utf-8")
)


def test_a_discrete_codec_encodes_and_decodes_with_the_arguments_of_the_original(tiny_world):
    tokenizer = get_audio_tokenizer(str(tiny_world.codec_dir), "mel_vq", flow_path=None, rank=0)
    tokenizer.load_model()
    codes = tokenizer.encode(tiny_world.audio("answer.wav"), is_discrete=True, is_contiguous=False)
    assert codes == tiny_world.codec.encode(tiny_world.audio("answer.wav"))
    assert torch.equal(tokenizer.decode(codes, option_steps=1), tiny_world.codec.decode(codes))
    assert torch.equal(tokenizer.decode(torch.tensor([codes])), tiny_world.codec.decode(codes))
    assert (tokenizer.is_discrete, tokenizer.is_contiguous) == (True, False)
    assert tokenizer.apply_to_role("user", is_discrete=True)
    assert tokenizer.apply_to_role("assistant", is_discrete=True)
    assert not tokenizer.apply_to_role("user", is_contiguous=True)


@pytest.mark.parametrize("case", ROLE_TABLE, ids=lambda case: f"{case['role']} {case['kwargs']}")
def test_the_role_rule_of_the_sensevoice_kinds_is_that_of_the_original(case):
    tokenizer = get_audio_tokenizer("anywhere", "sensevoice_glm4voice")
    assert tokenizer.apply_to_role(case["role"], **case["kwargs"]) == case["result"]


def test_a_sensevoice_kind_gives_features_or_codes_with_the_released_folders_side_by_side(
    tiny_world, tmp_path
):
    codec = tmp_path / "models" / "THUDM" / "codec"
    shutil.copytree(tiny_world.codec_dir, codec)
    tokenizer = get_audio_tokenizer(codec, "sensevoice_mel_vq")
    with pytest.raises(ValueError, match=r"^\S*FunAudioLLM/SenseVoiceSmall: no am\.mvn there"):
        tokenizer.load_model()
    frontend = tmp_path / "models" / "FunAudioLLM" / "SenseVoiceSmall"
    frontend.mkdir(parents=True)
    write_cmvn(frontend / "am.mvn", torch.zeros(560), torch.ones(560))
    clip = tiny_world.audio("question.wav")
    assert tokenizer.encode(clip).shape[1] == 560
    assert tokenizer.encode(clip, is_discrete=True, is_contiguous=False) == tiny_world.codec.encode(clip)
    assert (tokenizer.is_discrete, tokenizer.is_contiguous) == (True, True)


def test_nothing_is_opened_before_it_is_needed_and_an_unknown_kind_is_refused():
    get_audio_tokenizer("nowhere", "glm4voice")
    with pytest.raises(ValueError, match=r"^unknown audio tokenizer type 'cosyvoice'; known: glm4voice"):
        get_audio_tokenizer("nowhere", "cosyvoice")
    with pytest.raises(ValueError, match=r"^nowhere: no such folder"):
        get_audio_tokenizer("nowhere", "glm4voice").load_model()


def test_the_given_decoder_is_opened():
    folder = Path(__file__).parent / "goldens" / "glm4voice" / "tokenizer_block20"
    with pytest.raises(ValueError, match=r"^decoder_folder: no such folder"):
        get_audio_tokenizer(folder, "glm4voice", flow_path="decoder_folder").load_model()
