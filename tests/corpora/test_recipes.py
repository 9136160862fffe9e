"""Each set of the published mix, from a miniature of what its publisher offers to the files that the mix names."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vita_audio.audio import load_audio
from vita_audio.chat import prompts, read_samples
from vita_audio.cli.prepare_data import main
from vita_audio.corpora import RecipeError, Settings, SourceError, find_recipe, prepare, read_recipes

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = read_recipes()


def published() -> list[dict[str, str]]:
    with (REPOSITORY / "tests/goldens/recipe/published_mix.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_recipes_write_the_very_files_of_the_published_mix():
    wanted: dict[str, set[str]] = {}
    for row in published():
        wanted.setdefault(row["set"], set()).add(row["file"])
    written = {name: set(recipe.outputs) for name, recipe in RECIPES.items()}
    assert written == wanted
    assert len(written) == 34
    assert sum(map(len, written.values())) == 116


def test_the_documentation_lists_every_set_as_its_recipe_says():
    page = (REPOSITORY / "docs/corpora.md").read_text(encoding="utf-8")
    for recipe in RECIPES.values():
        [row] = [line for line in page.splitlines() if line.startswith(f"| {recipe.name} |")]
        name, alias, tasks, files, license, size, pages = (
            cell.strip() for cell in row.strip("|").split(" | ")
        )
        assert (name, alias, files) == (recipe.name, f"`{recipe.alias}`", str(len(recipe.outputs)))
        assert (license, size) == (recipe.license, recipe.size)
        assert all(url in pages for url in recipe.page.split(", "))
        assert tasks == (", ".join(sorted({task for part in recipe.parts for task in part.tasks})) or tasks)
    assert page.count("](https://") >= len(RECIPES)


def test_the_command_lists_every_set(capsys):
    main(["--list"])
    said = capsys.readouterr().out
    assert all(
        f"{recipe.name} ({recipe.alias})\n  SOURCE   {recipe.source}\n" in said for recipe in RECIPES.values()
    )
    with pytest.raises(SystemExit):
        main(["librispeech"])
    assert "give NAME, SOURCE and --root, or --list" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_miniature_gives_its_samples_and_reasons(name, miniatures, tmp_path):
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    expected = miniatures[name](source)
    tallies = prepare(RECIPES[name], source, root, Settings())
    expected = {output.replace("//", "/"): counts for output, counts in expected.items()}
    assert {output: (tally.samples, dict(tally.rejected)) for output, tally in tallies.items()} == expected
    for output, (count, reasons) in expected.items():
        samples = [sample for _, sample in read_samples(root / output, root)]
        assert len(samples) == count
        for sample in samples:
            for audio in sample.audios:
                assert len(load_audio(audio)[0])
        listed = [json.loads(line) for line in (root / output.replace(".jsonl", ".rejected.jsonl")).open()]
        assert sorted(one["reason"] for one in listed) == sorted(
            reason for reason, number in reasons.items() for _ in range(number)
        )
        assert all(one["message"] and "\n" not in one["message"] for one in listed)
    assert not (root / ".prepare").exists() or not any((root / ".prepare").iterdir())


def prepared(name: str, miniatures, folder: Path, **settings) -> dict[str, list]:
    (folder / "source").mkdir()
    miniatures[name](folder / "source")
    tallies = prepare(RECIPES[name], folder / "source", folder / "root", Settings(**settings))
    return {
        Path(output).name: [sample for _, sample in read_samples(folder / "root" / output, folder / "root")]
        for output in tallies
    }


def test_recognition_and_synthesis_are_a_switch(miniatures, tmp_path):
    samples = prepared("MushanW/GLOBE_V2", miniatures, tmp_path, tasks=("asr", "tts"))["train.jsonl"]
    assert [prompts.task_of(prompts.from_sample(sample)) for sample in samples] == ["ASR", "TTS"] * 2
    assert samples[0].audios == samples[1].audios


def test_a_voice_prompt_is_another_utterance_of_the_speaker(miniatures, tmp_path):
    files = prepared("amphion/Emilia-Dataset/speaker_prompt", miniatures, tmp_path)
    assert len(files) == 22
    for samples in files.values():
        [sample] = samples
        assert prompts.task_of(prompts.from_sample(sample)) == "voice clone"
        first, second = sample.audios
        assert first.endswith("W000000.mp3")
        assert second.endswith("W000001.mp3")


def test_clips_of_an_uncompressed_archive_stay_in_it(miniatures, tmp_path):
    files = prepared("amphion/Emilia-Dataset", miniatures, tmp_path)
    audios = [audio for samples in files.values() for sample in samples for audio in sample.audios]
    assert all("source/Emilia/" in audio for audio in audios)
    assert not (tmp_path / "root/datasets/clips").exists()


def test_clips_of_a_parquet_file_can_stay_in_it(miniatures, tmp_path):
    for name, audio in {
        "MushanW/GLOBE_V2": "/data/train-00000-of-00123.parquet/audio/",
        "gpt-omni/VoiceAssistant-400K": "/data/train-00000-of-00325.parquet/question_audio/",
    }.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        [samples] = prepared(name, miniatures, folder, clips="stay").values()
        assert [sample.audios[0] for sample in samples] == [
            f"{folder}/source{audio}{row}" for row in range(2)
        ]
        assert [len(load_audio(sample.audios[0])[0]) for sample in samples] == [24_000] * 2
        assert not (folder / "root/datasets/clips").exists()


def test_texts_are_written_as_a_model_should_write_them(miniatures, tmp_path):
    for name, said in {
        "fixie-ai/librispeech_asr": "the quiet river runs past the mill",
        "speechcolab/gigaspeech": "The quiet river runs past the mill.",
        "wenet-e2e/wenetspeech": "今天天气很好我们出去走走",
    }.items():
        folder = tmp_path / name.replace("/", "-")
        folder.mkdir()
        first = next(iter(prepared(name, miniatures, folder).values()))[0]
        assert first.messages[-1].text == said


def test_every_conversation_form_becomes_turns(miniatures, tmp_path):
    [sample, *_] = prepared("lima", miniatures, tmp_path)["train.jsonl"]
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    folder = tmp_path / "dolly"
    folder.mkdir()
    [sample] = prepared("databricks-dolly-15k", miniatures, folder)["databricks-dolly-15k.jsonl"]
    assert sample.messages[0].text == "What is two plus two?", "an empty context leaves no blank lines"


def test_spoken_answers_keep_their_text_before_the_speech(miniatures, tmp_path):
    [sample, _] = prepared("VITA-MLLM/AudioQA-1M", miniatures, tmp_path)["data.jsonl"]
    assert [message.role for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1].text == ""
    assert sample.messages[2].content == "好的，今天天气很好我们出去走走。\n<|audio|>"
    assert "answer_part1_shuf_part_3.tar/answer_part1_shuf_part_3/wav/" in sample.audios[1]


def test_the_original_releases_are_read_too(tmp_path, sound):
    """LibriSpeech and LibriTTS of OpenSLR, and Mozilla's archives of Common Voice."""
    source, root = tmp_path / "source", tmp_path / "root"
    words = ["THE QUIET RIVER RUNS PAST THE MILL", "A SMALL BOAT WAITS AT THE BRIDGE"]
    chapter = source / "LibriSpeech/train-clean-100/103/1240"
    book = source / "LibriTTS/train-clean-100/84/121123"
    voice = source / "cv-corpus-17.0-2024-03-15/en"
    for folder in (chapter, book, voice / "clips"):
        folder.mkdir(parents=True)
    rows = ["client_id\tpath\tsentence_id\tsentence\n"]
    for number, text in enumerate(words):
        (chapter / f"103-1240-000{number}.flac").write_bytes(sound(number, "flac"))
        (book / f"84_121123_000007_00000{number}.wav").write_bytes(sound(number))
        (voice / f"clips/common_voice_en_{number}.mp3").write_bytes(sound(number, "mp3"))
        rows.append(f"c{number}\tcommon_voice_en_{number}.mp3\ts\t{text.lower()}\n")
    names = [f"84_121123_000007_00000{number}" for number in range(2)]
    (chapter / "103-1240.trans.txt").write_text(
        "".join(f"103-1240-000{n} {text}\n" for n, text in enumerate(words))
    )
    (book / "84_121123.trans.tsv").write_text(
        "".join(f"{name}\t{text}\t{text.capitalize()}\n" for name, text in zip(names, words, strict=True))
    )
    (book / "84_121123.book.tsv").write_text("".join(f"{name}\ta\tb\t0.0\t30.0\n" for name in names))
    (voice / "train.tsv").write_text("".join(rows))
    for name, output, text in (
        ("fixie-ai/librispeech_asr", "train.100.clean.jsonl", "the quiet river runs past the mill"),
        ("mythicinfinity/libritts", "libritts/train.clean.100.jsonl", "The quiet river runs past the mill"),
        ("mozilla-foundation/common_voice_17_0", "en/train.jsonl", "the quiet river runs past the mill"),
    ):
        [(path, tally)] = prepare(RECIPES[name], source, root, Settings()).items()
        assert path.endswith(output)
        assert (tally.samples, dict(tally.rejected)) == (2, {})
        [first, _] = [sample for _, sample in read_samples(root / path, root)]
        assert text.lower() in " ".join(message.text for message in first.messages).lower()
        assert first.audios[0].startswith(str(source)), "single files stay where they are"


def test_the_mix_authors_copy_of_voice_assistant_is_read_as_it_is(tmp_path, sound, write_lines):
    source = tmp_path / "source"
    (source / "audio").mkdir(parents=True)
    for number in range(2):
        (source / f"audio/{number}.wav").write_bytes(sound(number))
    turns = [
        {"role": "user", "content": "<|audio|>"},
        {"role": "assistant", "content": "It is four.\n<|audio|>"},
    ]
    audios = [f"datasets/gpt-omni/VoiceAssistant-400K/audio/{number}.wav" for number in range(2)]
    write_lines(source / "data.jsonl", [{"messages": turns, "audios": audios}])
    tallies = prepare(RECIPES["gpt-omni/VoiceAssistant-400K"], source, tmp_path / "root", Settings())
    [tally] = tallies.values()
    assert (tally.samples, dict(tally.rejected)) == (1, {})


def test_what_is_not_there_is_said_in_one_line(tmp_path, miniatures, caplog):
    recipe = RECIPES["mythicinfinity/libritts"]
    with pytest.raises(SourceError, match=r"^\S+source: no such folder; it must hold libritts/[^\n]*$"):
        prepare(recipe, tmp_path / "source", tmp_path / "root", Settings())
    (tmp_path / "source").mkdir()
    with pytest.raises(SourceError, match=r"^\S+source: holds nothing of mythicinfinity/libritts[^\n]*$"):
        prepare(recipe, tmp_path / "source", tmp_path / "root", Settings())
    miniatures["mythicinfinity/libritts"](tmp_path / "source")
    (tmp_path / "source/libritts_r").rename(tmp_path / "elsewhere")
    caplog.clear()
    assert len(prepare(recipe, tmp_path / "source", tmp_path / "root", Settings())) == 3
    assert caplog.text.count("has nothing like libritts_r/") == 3
    with pytest.raises(RecipeError, match=r"^librivox: no such set; --list shows all$"):
        find_recipe("librivox", RECIPES)


def test_a_row_without_the_named_column_is_rejected_with_the_columns_that_it_has(tmp_path, write_lines):
    source = tmp_path / "source"
    write_lines(source / "dataset.json", [json.dumps([{"question": "?", "output": "!"}])])
    [tally] = prepare(RECIPES["goat"], source, tmp_path / "root", Settings()).values()
    assert dict(tally.rejected) == {"bad_row": 1}
    [line] = (tmp_path / "root/datasets/jsonl/tiedong/goat/dataset.rejected.jsonl").read_text().splitlines()
    assert "no column 'instruction'; it has question, output" in line


def test_a_recipe_with_a_mistake_is_refused_with_its_place(tmp_path):
    about = "alias: a\n  page: p\n  license: l\n  size: s\n  source: x\n  layout: text\n"
    for entry, message in {
        "set: []": "needs 'files'",
        f"set:\n  {about}  tasks: [sing]\n  files: {{a.jsonl: b}}": "'tasks' must be of asr, tts, clone",
        f"set:\n  {about}  files: {{a.jsonl: 3}}": "needs a pattern",
        "set: {files: {a: b}}": "needs a text for alias",
        "- a": "must map names",
        "set: [": "cannot be read",
    }.items():
        (tmp_path / "bad.yaml").write_text(entry)
        with pytest.raises(RecipeError, match=rf"^\S+bad\.yaml[^\n]*{message}[^\n]*$"):
            read_recipes(tmp_path)
    (tmp_path / "bad.yaml").write_text(
        f"set:\n  {about}  files: {{a.jsonl: b}}\n  colour: red\n  messages: m"
    )
    (tmp_path / "source").mkdir()
    recipe = read_recipes(tmp_path)["set"]
    with pytest.raises(
        SourceError, match=r"set: a\.jsonl: text: got an unexpected keyword argument 'colour'"
    ):
        prepare(recipe, tmp_path / "source", tmp_path / "root", Settings())
