"""One's own recordings: every form of a folder becomes the same samples."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from vita_audio.audio import load_audio
from vita_audio.chat import prompts, read_samples
from vita_audio.cli.prepare_data import main
from vita_audio.corpora import SourceError, form_of
from vita_audio.corpora.folders import cues
from vita_audio.data.mixing import Mix, read_mix

CLIPS = 200
RATE = 8000
TEXTS = {f"clip{number:03d}": f"This is the sentence with the number {number}." for number in range(CLIPS)}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> dict[str, Path]:
    """Two hundred clips of one voice, by id."""
    folder = tmp_path_factory.mktemp("recordings")
    for number, name in enumerate(TEXTS):
        time = np.arange(int(RATE * (1.5 + number % 4 / 2))) / RATE
        soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(time * (700 + number)), RATE)
    return {path.stem: path for path in sorted(folder.iterdir())}


def copy(recordings: dict[str, Path], folder: Path, name: str = "{}.wav") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for id_, path in recordings.items():
        shutil.copy(path, folder / name.format(id_))


def beside(recordings, folder):
    copy(recordings, folder)
    for id_, text in TEXTS.items():
        (folder / f"{id_}.txt").write_text(text + "\n")


def flac_beside(recordings, folder):
    for id_, path in recordings.items():
        soundfile.write(folder / f"{id_}.flac", *soundfile.read(path))
        (folder / f"{id_}.txt").write_text("\ufeff" + TEXTS[id_], encoding="utf-8")


def comma_table(recordings, folder, delimiter=",", name="list.csv"):
    copy(recordings, folder / "wavs")
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["path", "duration", "sentence"])
        rows.writerows([f"{id_}.wav", 1, text] for id_, text in TEXTS.items())


def tab_table(recordings, folder):
    comma_table(recordings, folder, "\t", "list.tsv")


def audio_folder(recordings, folder):
    copy(recordings, folder / "train")
    rows = ({"file_name": f"{id_}.wav", "transcription": text} for id_, text in TEXTS.items())
    (folder / "train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ljspeech(recordings, folder):
    copy(recordings, folder / "wavs")
    rows = (f"{id_}|{text.replace('number', 'No.')}|{text}\n" for id_, text in TEXTS.items())
    (folder / "metadata.csv").write_text("".join(rows))


def vctk(recordings, folder):
    (folder / "txt/p225").mkdir(parents=True)
    copy(recordings, folder / "wav48_silence_trimmed/p225", "{}_mic1.wav")
    copy(recordings, folder / "wav48_silence_trimmed/p225", "{}_mic2.wav")
    for id_, text in TEXTS.items():
        (folder / f"txt/p225/{id_}.txt").write_text(text)


def kaldi(recordings, folder):
    lines = {
        "wav.scp": (f"{id_} {path}\n" for id_, path in recordings.items()),
        "text": (f"{id_} {text}\n" for id_, text in TEXTS.items()),
        "utt2spk": (f"{id_} me\n" for id_ in TEXTS),
    }
    for name, content in lines.items():
        (folder / name).write_text("".join(content))


def kaldi_segments(recordings, folder):
    _, times = long_recording(recordings, folder / "long.wav")
    lines = {
        "wav.scp": ["long long.wav\n"],
        "text": (f"{id_} {text}\n" for id_, text in TEXTS.items()),
        "segments": (f"{id_} long {start:.6f} {end:.6f}\n" for id_, (start, end) in times.items()),
    }
    for name, content in lines.items():
        (folder / name).write_text("".join(content))


def web_subtitles(recordings, folder):
    _, times = long_recording(recordings, folder / "clip.wav")
    blocks = ["WEBVTT\n\nNOTE a comment\n"]
    for id_, (start, end) in times.items():
        blocks.append(
            f"{id_}\n{stamp(start)} --> {stamp(end)} align:start\n<v Me>{TEXTS[id_].replace('with', '<i>with</i>')}\n"
        )
    (folder / "clip.vtt").write_text("\n".join(blocks))


def srt_subtitles(recordings, folder):
    _, times = long_recording(recordings, folder / "clip.wav")
    blocks = []
    for number, (id_, (start, end)) in enumerate(times.items(), 1):
        words = TEXTS[id_].split()
        two_lines = f"{' '.join(words[:4])}\r\n{' '.join(words[4:])}"
        blocks.append(f"{number}\r\n{stamp(start, ',')} --> {stamp(end, ',')}\r\n{two_lines}\r\n")
    (folder / "clip.srt").write_text("\r\n".join(blocks), newline="")


def long_recording(recordings, path):
    """All clips in one file, and where each is, in seconds."""
    pieces, times, at = [], {}, 0
    for id_, clip in recordings.items():
        pieces.append(soundfile.read(clip, dtype="float32")[0])
        times[id_] = (at / RATE, (at + len(pieces[-1])) / RATE)
        at += len(pieces[-1])
    soundfile.write(path, np.concatenate(pieces), RATE)
    return path, times


def stamp(seconds: float, separator: str = ".") -> str:
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    minutes, whole = divmod(whole, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{whole:02d}{separator}{thousandths:03d}"


FORMS = {
    "beside": [beside, flac_beside],
    "table": [comma_table, tab_table, audio_folder],
    "ljspeech": [ljspeech],
    "vctk": [vctk],
    "kaldi": [kaldi, kaldi_segments],
    "subtitles": [web_subtitles, srt_subtitles],
}


@pytest.mark.parametrize(
    ("form", "maker"),
    [(form, maker) for form, makers in FORMS.items() for maker in makers],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_every_form_becomes_the_same_samples(form, maker, recordings, tmp_path):
    folder = tmp_path / "voice"
    folder.mkdir()
    maker(recordings, folder)
    assert form_of(folder) == form
    main(["folder", str(folder), "--root", str(tmp_path / "root"), "--test_every", "10", "--language", "en"])
    samples = read(tmp_path / "root/own")
    train, test = CLIPS * 9 // 10, CLIPS // 10
    assert {name: len(found) for name, found in samples.items()} == {
        "asr": train,
        "tts": train,
        "clone": train - 1,
        "asr_test": test,
        "tts_test": test,
    }
    for name in ("asr", "asr_test"):
        said = [sample.messages[-1].text for sample in samples[name]]
        assert said == [
            text for number, text in enumerate(TEXTS.values()) if (number % 10 == 0) == (name == "asr_test")
        ]
    for text, sample in zip(list(TEXTS.values())[1:10], samples["tts"], strict=False):
        id_ = next(name for name, known in TEXTS.items() if known == text)
        waveform, rate = load_audio(sample.audios[0])
        expected, _ = load_audio(recordings[id_])
        assert rate == RATE
        assert len(waveform) == len(expected)
        assert float((waveform - expected).abs().max()) < 1e-3
    assert {prompts.task_of(prompts.from_sample(sample)) for sample in samples["clone"]} == {"voice clone"}
    assert all(sample.audios[0] != sample.audios[1] for sample in samples["clone"])


def read(folder: Path) -> dict[str, list]:
    names = ("asr", "tts", "clone", "asr_test", "tts_test")
    return {
        name: [sample for _, sample in read_samples(folder / f"{name}.jsonl", folder.parent)]
        for name in names
    }


def test_the_folder_comes_with_a_mix_that_opens(recordings, tmp_path):
    (tmp_path / "voice").mkdir()
    beside(recordings, tmp_path / "voice")
    main(
        ["folder", str(tmp_path / "voice"), "--root", str(tmp_path), "--name", "me", "--tasks", "asr", "tts"]
    )
    mix = Mix(read_mix(tmp_path / "me/mix.yaml", tmp_path), 0, strict=True, cache_dir=str(tmp_path / "arrow"))
    assert mix.used == [CLIPS, CLIPS]
    assert not (tmp_path / "me/clips").exists(), "clips stay where they are"
    first = json.loads((tmp_path / "me/asr.jsonl").read_text().splitlines()[0])
    assert first["audios"] == ["voice/clip000.wav"], "paths below the root are relative, so the data can move"


def test_what_has_no_partner_is_listed(tmp_path, sound):
    voice = tmp_path / "voice"
    (voice / "deep").mkdir(parents=True)
    for name in ("a", "deep/b", "c"):
        (voice / f"{name}.wav").write_bytes(sound(1))
    for name in ("a", "deep/b", "lost"):
        (voice / f"{name}.txt").write_text("a sentence of some words")
    main(["folder", str(voice), "--root", str(tmp_path), "--tasks", "asr"])
    listed = [json.loads(line) for line in (tmp_path / "own/asr.rejected.jsonl").open()]
    assert {(one["id"], one["reason"]) for one in listed} == {("c", "no_transcript"), ("lost", "no_audio")}
    ids = [sample.id for _, sample in read_samples(tmp_path / "own/asr.jsonl", tmp_path)]
    assert ids == ["a", "deep-b"]


def test_commands_in_a_kaldi_folder_are_not_run(tmp_path, sound):
    (tmp_path / "a.wav").write_bytes(sound(0))
    (tmp_path / "wav.scp").write_text(f"a touch {tmp_path}/ran |\nb a.wav\n")
    (tmp_path / "text").write_text("a one sentence here\nb two sentences are here\nc no recording\n")
    main(["folder", str(tmp_path), "--root", str(tmp_path / "root"), "--tasks", "asr"])
    listed = [json.loads(line)["message"] for line in (tmp_path / "root/own/asr.rejected.jsonl").open()]
    assert len(listed) == 2
    assert "the recording a is a command, which is not run" in listed[0]
    assert "the recording c is not in wav.scp" in listed[1]
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_recordings_or_with_other_columns_is_refused_in_one_line(tmp_path):
    with pytest.raises(
        SourceError, match=r"^\S+: holds no recordings with transcripts; known forms: kaldi[^\n]*$"
    ):
        form_of(tmp_path)
    (tmp_path / "list.csv").write_text("sound,words\na.wav,hello\n")
    with pytest.raises(
        SourceError, match=r"^\S+list\.csv: needs columns file_name or audio[^\n]*it has sound, words$"
    ):
        main(["folder", str(tmp_path), "--root", str(tmp_path / "root")])


def test_cues_of_short_times_and_without_text_are_read():
    text = "WEBVTT\n\n01:02.500 --> 01:03.000\nHi &amp; bye\n\n1\n00:00:01,000 --> 00:00:02,000\n\n"
    assert list(cues(text)) == [(62.5, 63.0, "Hi & bye"), (1.0, 2.0, "")]
