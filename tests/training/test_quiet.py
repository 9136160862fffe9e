"""A run prints what its user can act on."""

import re
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from vita_audio.training.quiet import LIBRARY_LOG_LINES, LIBRARY_WARNINGS, hush_libraries


@pytest.fixture
def hushed():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hush_libraries()
        yield shown


def test_listed_warnings_are_hidden_and_others_are_shown(hushed):
    warnings.warn("'set_vital' is deprecated, please do not call", stacklevel=1)
    name = "torch.distributed.all_gather_into_tensor"
    warnings.warn(f"`{name}` is deprecated. Please use another.", FutureWarning, stacklevel=1)
    assert hushed == []
    warnings.warn("`my_own_option` is deprecated", FutureWarning, stacklevel=1)
    warnings.warn("the learning rate was reset", stacklevel=1)
    assert [str(one.message) for one in hushed] == [
        "`my_own_option` is deprecated",
        "the learning rate was reset",
    ]


def test_listed_log_lines_are_hidden_and_others_are_shown(hushed, caplog):
    logger = transformers_logging.get_logger("transformers.modeling_utils")
    logger.warning("The new embeddings will be initialized from a multivariate normal distribution that …")
    logger.warning("Some weights were not initialized: %s", "lm_head.weight")
    assert [record.getMessage() for record in caplog.records] == [
        "Some weights were not initialized: lm_head.weight"
    ]


@pytest.mark.slow
def test_a_short_training_prints_no_warning_of_a_library(tiny_world):
    run = tiny_world.run_stage(
        "mtp10_stage2",
        MODEL_NAME_OR_PATH=str(tiny_world.root / "base"),
        NUM_HEADS="2",
        MAX_STEPS="2",
        NPROC_PER_NODE="1",
        DEEPSPEED_CONFIG="",
    )
    assert run.returncode == 0, run.stderr[-2000:]
    printed = run.stdout + run.stderr
    assert not re.findall(r".*\w+Warning: .*", printed)
    for _, text in LIBRARY_WARNINGS:
        assert not re.search(text, printed)
    for text in (text for texts in LIBRARY_LOG_LINES.values() for text in texts):
        assert not re.search(text, printed)
    assert "WARNING vita_audio.models" in printed  # heads that were grown are the user's to know
