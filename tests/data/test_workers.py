"""The processes of the loader. That they end with a killed trainer is tested with real ones in test_loader.py."""

import multiprocessing
import os
import threading

import pytest
import torch

from vita_audio.data.workers import set_up_worker


@pytest.fixture
def trainer(monkeypatch) -> threading.Event:
    """Set it to end the trainer that this process believes to be its parent."""
    ended = threading.Event()
    parent = type("Trainer", (), {"join": lambda self: ended.wait(60)})()
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    return ended


def test_a_worker_uses_one_core_and_leaves_with_its_trainer(trainer, monkeypatch):
    left, statuses = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), left.set()))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        set_up_worker(0)
        assert torch.get_num_threads() == 1
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        assert statuses == []
        trainer.set()
        assert left.wait(60)
        assert statuses == [1]
    finally:
        torch.set_num_threads(threads)
