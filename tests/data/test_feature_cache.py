"""SenseVoice features on disk: the same features, never another clip's, never in the way."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio import AudioError
from vita_audio.data import CodecSpec
from vita_audio.data.feature_cache import FeatureCache
from vita_audio.data.speech import SpeechReader

CMVN = Path(__file__).parents[1] / "goldens" / "sensevoice" / "am.mvn"


def write_clip(path: Path, seed: int, samples: int = 8000) -> str:
    soundfile.write(path, np.random.default_rng(seed).standard_normal(samples) * 0.1, 16_000)
    return str(path)


@pytest.fixture
def open_reader(tmp_path):
    def open_reader(frontend: Path = CMVN, cached: bool = True) -> SpeechReader:
        cache = str(tmp_path / "features") if cached else None
        spec = CodecSpec("sensevoice_mel_vq", frontend_path=str(frontend), feature_cache=cache)
        return SpeechReader(spec, data_root=tmp_path)

    return open_reader


def test_features_are_computed_once_and_stay_the_same(tmp_path, open_reader):
    clip = write_clip(tmp_path / "a.wav", 0)
    plain = open_reader(cached=False).features(clip)
    first, second = open_reader(), open_reader()
    assert torch.equal(first.features(clip), plain)
    assert torch.equal(second.features(clip), plain)
    assert (first.sources, second.sources) == ({"features": 1}, {"feature_cache": 1})


def test_another_clip_or_another_normalisation_is_computed_again(tmp_path, open_reader):
    clip = write_clip(tmp_path / "a.wav", 0)
    open_reader().features(clip)
    write_clip(tmp_path / "a.wav", 1, samples=9000)
    reader = open_reader()
    assert torch.equal(reader.features(clip), open_reader(cached=False).features(clip))
    assert reader.sources == {"features": 1}
    other = tmp_path / "am.mvn"
    other.write_text(CMVN.read_text() + "\n")
    reader = open_reader(other)
    reader.features(clip)
    assert reader.sources == {"features": 1}


def test_the_data_may_move_with_its_root(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        clip = write_clip(tmp_path / name / "a.wav", 0)
        spec = CodecSpec(
            "sensevoice_mel_vq", frontend_path=str(CMVN), feature_cache=str(tmp_path / "features")
        )
        reader = SpeechReader(spec, data_root=tmp_path / name)
        reader.features(clip)
    assert reader.sources == {"feature_cache": 1}


@pytest.mark.parametrize("damage", [b"", b"no tensors here", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_file_is_computed_again_and_mended(tmp_path, open_reader, damage):
    clip = write_clip(tmp_path / "a.wav", 0)
    expected = open_reader().features(clip)
    (file,) = (tmp_path / "features").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100] if damage is None else damage)
    reader = open_reader()
    assert torch.equal(reader.features(clip), expected)
    assert reader.sources == {"features": 1}
    reader.features(clip)
    assert reader.sources["feature_cache"] == 1


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.touch()
    cache = FeatureCache(blocked, "frontend")
    for key in ("a.wav", "b.wav"):
        cache.put(key, 1, torch.zeros(2, 3))
        assert cache.find(key, 1) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_missing_audio_remains_a_separate_error(tmp_path, open_reader):
    with pytest.raises(AudioError, match=r"absent\.wav"):
        open_reader().features(str(tmp_path / "absent.wav"))


def test_no_partial_file_is_left(tmp_path, open_reader):
    open_reader().features(write_clip(tmp_path / "a.wav", 0))
    names = [name for _, _, files in os.walk(tmp_path / "features") for name in files]
    assert len(names) == 1
    assert names[0].endswith(".safetensors")
