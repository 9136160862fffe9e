"""Every benchmark of the paper, prepared from a miniature of its public layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vita_audio.cli.prepare_benchmark import main
from vita_audio.evaluation.benchmarks import choose, published_benchmarks
from vita_audio.evaluation.scoreboard import TASKS


def prepared(name: str, source: Path, root: Path) -> list:
    """The items of a benchmark after preparation, as the evaluation reads them."""
    main([name, str(source), "--root", str(root)])
    one = published_benchmarks()[name]
    task = one.make_task() if one.task == "seed_tts" else TASKS[one.task]
    return task.read(one.path(root), root)


def test_there_is_a_miniature_of_every_benchmark(counts):
    assert set(counts) == set(published_benchmarks())


@pytest.mark.parametrize("name", published_benchmarks())
def test_a_benchmark_is_prepared_whole_where_the_evaluation_finds_it(
    name, miniature, counts, tmp_path, capsys
):
    root = tmp_path / "root"
    items = prepared(name, miniature(name), root)
    assert len(items) == counts[name]
    chosen, missing = choose(["paper"], root)
    assert [one.name for one in chosen] == [name]
    assert len(missing) == len(counts) - 1
    path = chosen[0].path(root)
    facts = json.loads(path.with_name(f"{path.name}.prepared.json").read_text())
    assert capsys.readouterr().out.endswith(f"{counts[name]} items, checksum {facts['checksum']}\n")


def test_questions_keep_all_accepted_answers(miniature, tmp_path):
    first, second = prepared("trivia-qa", miniature("trivia-qa"), tmp_path / "root")
    assert (first.id, first.answers) == ("tc_2", ("Sinclair Lewis", "Lewis"))
    assert second.answers == ("Judi Dench",)
    assert first.conversation.messages[-1].texts == ("", ""), "only the speech is asked"


def test_transcripts_are_those_of_the_publisher(miniature, tmp_path):
    items = prepared("fleurs-zh", miniature("fleurs-zh"), tmp_path / "root")
    assert sorted(item.answer for item in items) == sorted(["今天天气很好", "今天天气很好", "他在书店里工作"])
    assert len({item.id for item in items}) == 3
    items = prepared("librispeech-test-other", miniature("librispeech-test-other"), tmp_path / "root")
    assert [(item.id, item.answer) for item in items] == [
        ("61-7-test-0", "THE RIVER THE RIVER"),
        ("61-7-test-1", "a blue key lies here"),
    ]


def test_seed_tts_comes_from_the_archive_or_from_the_folder(miniature, seed_tts_archive, tmp_path):
    sums = set()
    for where in (
        miniature("seed-tts-zh"),
        tmp_path / "source" / "seedtts_testset",
        seed_tts_archive,
    ):
        root = tmp_path / f"root-{len(sums)}-{where.name}"
        items = prepared("seed-tts-zh", where, root)
        assert [item.id for item in items] == ["meta-0", "meta-1"]
        assert Path(items[0].voice).name == "p0.wav"
        assert Path(items[0].reference_audio).name == "meta-0.wav"
        sums.add(
            (root / published_benchmarks()["seed-tts-zh"].file)
            .with_name("meta.lst.prepared.json")
            .read_text()
        )
    assert len(sums) == 1, "the same set has the same checksum"


def test_an_incomplete_source_leaves_no_half_set(miniature, tmp_path):
    folder = miniature("aishell-1")
    next(folder.rglob("test/S0764/*.wav")).write_bytes(b"RIFF, and then nothing")
    with pytest.raises(
        ValueError, match="1 of 2 items of aishell-1 cannot be used, so it would not be whole"
    ):
        main(["aishell-1", str(folder), "--root", str(tmp_path / "root")])
    assert choose(["paper"], tmp_path / "root")[0] == []


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "llama-questions",
            lambda folder: shutil.rmtree(folder / "data"),
            "holds nothing of llama-questions",
        ),
        ("seed-tts-en", lambda folder: shutil.rmtree(folder / "seedtts_testset/en"), "has no en/meta.lst"),
        (
            "seed-tts-en",
            lambda folder: (folder / "seedtts_testset/en/prompt-wavs/p1.wav").unlink(),
            "prompt-wavs/p1.wav: no such file; the list names it",
        ),
        (
            "seed-tts-en",
            lambda folder: (folder / "seedtts_testset/en/meta.lst").write_text("a|b|../../etc/passwd|c\n"),
            "relative to its folder",
        ),
        ("fleurs-en", lambda folder: (folder / "data/en_us/test.tsv").unlink(), "cannot be used"),
    ],
)
def test_what_a_source_lacks_is_named(miniature, tmp_path, name, spoil, message):
    folder = miniature(name)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        main([name, str(folder), "--root", str(tmp_path / "root")])


def test_unknown_names_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"x: no such benchmark; known: .*llama-questions"):
        main(["x", str(tmp_path), "--root", str(tmp_path)])
    with pytest.raises(ValueError, match="nowhere: does not exist; it must hold a copy"):
        main(["llama-questions", str(tmp_path / "nowhere"), "--root", str(tmp_path)])


def test_the_list_says_what_each_source_must_hold(capsys):
    main(["--list"])
    said = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{said}" for name in published_benchmarks())
    assert said.count("SOURCE") == len(published_benchmarks())
