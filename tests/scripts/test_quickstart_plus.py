"""The whole chain in small with SenseVoice's continuous features."""

import json

import pytest
from quickstart_chain import CHAIN_SECONDS, start_chain

pytestmark = pytest.mark.slow


def test_the_plus_variant_runs_through_all_stages_and_is_scored(tmp_path):
    out = tmp_path / "plus"
    assert start_chain(out, "--variant", "plus").wait(CHAIN_SECONDS) == 0, said(tmp_path)
    rows = json.loads((out / "evaluation/results.json").read_text())
    assert {row["stage"] for row in rows} == {"stage1", "stage2", "stage3", "stage4"}
    for row in rows:
        assert row["asr_wer"] is not None
        assert row["sqa_s2s_accuracy"] is not None
    config = json.loads(next(out.glob("stages/*mtp10_stage2/quickstart/config.json")).read_text())
    assert config["model_type"] == "qwen2_mtp_sensevoice"
    assert (out / "report.html").stat().st_size


def said(folder):
    return (folder / "output.txt").read_text()[-3000:]
