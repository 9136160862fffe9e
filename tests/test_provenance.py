"""What is written about a run says which code, versions, options and data it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vita_audio import provenance
from vita_audio.provenance import describe_run, git_revision


def test_a_run_is_described_in_plain_json():
    run = describe_run(
        "train", {"rate": 1e-3, "folder": Path("a"), "ratio": (1, 2)}, {"fingerprint": "f"}, more=1
    )
    assert json.loads(json.dumps(run)) == run
    assert run["arguments"] == {"rate": 1e-3, "folder": "a", "ratio": [1, 2]}
    assert (run["command"], run["data"], run["more"]) == ("train", {"fingerprint": "f"}, 1)
    assert run["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert run["versions"]["transformers"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose root holds the package, as ours does."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "vita_audio").mkdir()
    (tmp_path / "vita_audio" / "provenance.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "vita_audio" / "provenance.py"))
    return tmp_path


def test_the_revision_of_the_checkout_is_known_and_whether_it_was_changed(checkout):
    head = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    assert git_revision() == {"revision": head.stdout.strip(), "modified": False}
    (checkout / "untracked").write_text("")
    assert git_revision()["modified"] is False
    (checkout / "vita_audio" / "provenance.py").write_text("changed")
    assert git_revision()["modified"] is True


def test_outside_of_a_checkout_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "vita_audio" / "provenance.py"))
    assert git_revision() is None


def test_a_package_installed_inside_another_repository_has_no_revision(checkout, monkeypatch):
    inside = checkout / "venv" / "vita_audio"
    inside.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(inside / "provenance.py"))
    assert git_revision() is None
