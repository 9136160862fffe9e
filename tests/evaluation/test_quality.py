"""The predicted quality of speech, with a stand-in for the package that has the network."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest

from vita_audio.cli.evaluate import main
from vita_audio.evaluation import quality


@pytest.fixture
def heard(monkeypatch) -> list[np.ndarray]:
    """Clips that the stand-in was given; it calls each of them 3.25."""
    clips: list[np.ndarray] = []

    def run(sample, sr):
        assert sr == 16_000
        clips.append(sample)
        return {"ovrl_mos": np.float64(3.25), "sig_mos": 4.0, "bak_mos": 4.0, "p808_mos": 4.0}

    for name in ("speechmos", "speechmos.dnsmos", "onnxruntime"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.run = run
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(quality, "version", lambda name: "1.0")
    return clips


@pytest.fixture
def flags(tiny_flags) -> list[str]:
    return tiny_flags("--speed_items", "0", "--quality_model", "dnsmos", mode="@turbo")


def test_synthesised_speech_has_a_column_of_its_quality(flags, heard, tmp_path):
    main(flags)
    (row,) = json.loads((tmp_path / "out/results.json").read_text())
    assert row["tts_quality"] == 3.25
    assert row["sets"]["tts"]["quality"] == "dnsmos, speechmos 1.0"
    assert row["sets"]["sqa"]["quality"] is None
    assert "DNSMOS" in (tmp_path / "out/results.md").read_text()
    assert "DNSMOS 3.25" in (tmp_path / "out/tiny-turbo/tts.html").read_text()
    (clip,) = heard
    assert clip.ndim == 1
    assert np.abs(clip).max() <= 1


def test_a_missing_package_is_named_before_a_model_is_loaded(flags, monkeypatch):
    monkeypatch.setattr(quality, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs speechmos; pip install -e '\.\[mos\]'"):
        main(flags)
