"""Odd and damaged files of publishers and of people cost themselves, each with a reason, and nothing else."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from miniatures.files import clip, lines, tar, write

from vita_audio.audio import load_audio
from vita_audio.chat import read_samples
from vita_audio.corpora import Settings, SourceError, form_of, prepare, read_recipes
from vita_audio.corpora.own import own_recipe

RECIPES = read_recipes()
TEXT = "the quiet river runs past the mill"
OTHER = "a small boat waits at the bridge"


def outcome(name: str, make: Callable[[Path], object], folder: Path) -> tuple[int, dict[str, int]]:
    """Samples, each loadable, and rejections, each with a short message on one line."""
    source, root = folder / "source", folder / "root"
    source.mkdir()
    make(source)
    recipe = own_recipe("own", form_of(source), (), ("asr",), 0) if name == "own" else RECIPES[name]
    [(output, tally)] = prepare(recipe, source, root, Settings()).items()
    samples = [sample for _, sample in read_samples(root / output, root)] if tally.samples else []
    for sample in samples:
        for audio in sample.audios:
            assert len(load_audio(audio)[0])
    listed = (root / output.replace(".jsonl", ".rejected.jsonl")).read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["message"] for line in listed]
    assert all(message and "\n" not in message and len(message) <= 500 for message in messages)
    assert len(messages) == tally.rejected.total() == tally.read - len(samples)
    return len(samples), dict(tally.rejected)


# -- Parquet -------------------------------------------------------------------------------------------------


def globe(rows: list[dict] | pyarrow.Table) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        (source / "data").mkdir()
        table = pyarrow.Table.from_pylist(rows) if isinstance(rows, list) else rows
        pyarrow.parquet.write_table(table, source / "data/train-0.parquet")

    return make


def row(audio: object, text: object = TEXT) -> dict:
    return {"audio": audio, "transcript": text, "speaker_id": 7}


def sound(seed: int) -> dict:
    return {"bytes": clip(seed, "flac"), "path": f"{seed}.flac"}


COLUMNS = {
    "a path that is nowhere": ([row("x.flac")], (0, {"audio_missing": 1})),
    "a path that leaves the corpus": ([row("../" * 9 + "etc/passwd")], (0, {"audio_missing": 1})),
    "audio as numbers": ([row([0.1] * 9)], (0, {"no_audio": 1})),
    "no audio in one row": ([row(None), row(sound(1))], (1, {"no_audio": 1})),
    "text as a list": ([row(sound(1), [TEXT])], (0, {"bad_row": 1})),
    "text as a number": ([row(sound(1), float("nan")), row(sound(2), 1.5)], (0, {"bad_row": 2})),
    "no text in one row": ([row(sound(1), None), row(sound(2))], (1, {"empty_text": 1})),
    "text with a control character": ([row(sound(1), f"\0{TEXT}")], (1, {})),
    "other columns": ([{"x": 1}], (0, {"bad_row": 1})),
    "other types of text": (
        pyarrow.table(
            {
                "audio": [sound(1), sound(2)],
                "transcript": pyarrow.array([TEXT, OTHER]).dictionary_encode(),
                "speaker_id": pyarrow.array(["a", "b"], pyarrow.large_string()),
            }
        ),
        (2, {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_of_another_type_costs_its_rows(case, tmp_path):
    rows, expected = COLUMNS[case]
    assert outcome("MushanW/GLOBE_V2", globe(rows), tmp_path) == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write(path, b""),
        lambda path: path.mkdir(parents=True),
        lambda path: (path.parent.mkdir(), path.symlink_to("/nowhere")),
    ],
    ids=["empty", "folder", "link to nothing"],
)
def test_a_file_that_is_none_is_listed(make, tmp_path):
    made = outcome("MushanW/GLOBE_V2", lambda source: make(source / "data/train-0.parquet"), tmp_path)
    assert made == (0, {"damaged_file": 1})


# -- archives ------------------------------------------------------------------------------------------------


def emilia(members: list[tuple[str, bytes | str]]) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        path = source / "Emilia/EN/EN-B000000.tar"
        path.parent.mkdir(parents=True)
        with tarfile.open(path, "w") as archive:
            for name, content in members:
                content = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    return make


ABOUT = json.dumps({"text": TEXT, "speaker": "s"})
MEMBERS = {
    "names that leave the archive": (
        [("../../a.json", ABOUT), ("../../a.mp3", clip(1, "mp3")), ("/b.json", ABOUT), ("/b.mp3", clip(2, "mp3"))],
        (2, {}),
    ),
    "odd names": ([("a b/ü 中?*[1].json", ABOUT), ("a b/ü 中?*[1].mp3", clip(1, "mp3"))], (1, {})),
    "one name twice": (
        [("a.json", ABOUT), ("a.mp3", clip(1, "mp3")), ("a.json", ABOUT), ("a.mp3", clip(2, "mp3"))],
        (1, {"repeated": 1}),
    ),
    "JSON that is none": (
        [
            *[("a.json", "\ufeff" + ABOUT), ("a.mp3", clip(1, "mp3"))],
            *[("b.json", '{"text": NaN, "speaker": Infinity}'), ("b.mp3", clip(2, "mp3"))],
            *[("c.json", "[1]"), ("c.mp3", clip(3, "mp3")), ("d.json", "[" * 100_000), ("d.mp3", clip(4, "mp3"))],
        ],
        (1, {"bad_row": 3}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMBERS)
def test_odd_members_of_an_archive_cost_themselves(case, tmp_path):
    members, expected = MEMBERS[case]
    assert outcome("amphion/Emilia-Dataset", emilia(members), tmp_path) == expected


def test_of_two_members_with_one_name_text_and_speech_belong_together(tmp_path):
    first, second = clip(1, "mp3", 1.5), clip(2, "mp3", 3.0)
    members = [("a.json", ABOUT), ("a.mp3", first), ("a.json", ABOUT), ("a.mp3", second)]
    outcome("amphion/Emilia-Dataset", emilia(members), tmp_path)
    [(_, sample)] = read_samples(
        tmp_path / "root/datasets/jsonl/amphion/Emilia-Dataset/EN_B000000_B000100.jsonl", tmp_path / "root"
    )
    assert load_audio(sample.audios[0])[0].equal(load_audio(first)[0])


def test_a_page_in_place_of_an_archive_is_named_on_one_line(tmp_path):
    page = "<html>\nnot found</html>" * 50
    made = outcome(
        "amphion/Emilia-Dataset", lambda source: write(source / "Emilia/EN/EN-B000000.tar", page), tmp_path
    )
    assert made == (0, {"damaged_file": 1})


# -- tables beside archives ----------------------------------------------------------------------------------

HEADER = "id\traw_text\tspeaker_id"
TABLES = {
    "Windows": ("\ufeff" + f"{HEADER}\n1\t{TEXT}\ta\n2\t{OTHER}\tb\n".replace("\n", "\r\n"), (2, {})),
    "empty": ("", (0, {"no_transcript": 2})),
    "another encoding": (f"{HEADER}\n1\tcaf\xe9\ta\n2\t{OTHER}\tb\n".encode("latin-1"), (1, {"no_transcript": 1})),
    "a huge cell": (f"{HEADER}\n1\t{'x y ' * 100_000}\ta\n2\t{OTHER}\tb\n", (1, {"doubled_text": 1})),
    "two texts": (f"{HEADER}\n1\t{TEXT}\ta\n1\t{OTHER}\ta\n2\t{OTHER}\tb\n", (1, {"repeated": 1})),
    "a short row": (f"{HEADER}\n1\n2\t{OTHER}\tb\tmore\n", (1, {"empty_text": 1})),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_odd_rows_of_a_table_cost_themselves(case, tmp_path):
    content, expected = TABLES[case]

    def make(source: Path) -> None:
        tar(source / "data/en/train/train_part_0.tar.gz", {"t/1.wav": clip(1), "t/2.wav": clip(2)}, "w:gz")
        write(source / "data/en/asr_train.tsv", content)

    assert outcome("facebook/voxpopuli", make, tmp_path) == expected


def test_a_compressed_archive_that_is_cut_off_keeps_what_came_before(tmp_path):
    def make(source: Path) -> None:
        path = tar(source / "data/en/train/train_part_0.tar.gz", {"1.wav": clip(1), "2.wav": clip(2)}, "w:gz")
        path.write_bytes(path.read_bytes()[:-5000])
        write(source / "data/en/asr_train.tsv", f"{HEADER}\n1\t{TEXT}\ta\n2\t{OTHER}\tb\n")

    assert outcome("facebook/voxpopuli", make, tmp_path)[0] == 1


# -- text ----------------------------------------------------------------------------------------------------


def test_members_of_a_zip_archive_that_cannot_be_read_cost_themselves(tmp_path):
    good = json.dumps({"message_1": "What is two plus two?", "message_2": "Four."})

    def make(source: Path) -> None:
        with zipfile.ZipFile(source / "math.zip", "w") as archive:
            for name, content in {
                "../../a.json": good, "b.json": b"\xff\xfe", "c.json": "", "d.json": "[" * 200_000, "e.json": good,
                "f.json": "5",
            }.items():  # fmt: skip
                archive.writestr(name, content)
        content = bytearray((source / "math.zip").read_bytes())
        content[content.rindex(b"Four.", 0, content.index(b"f.json"))] ^= 1  # e.json
        (source / "math.zip").write_bytes(content)

    assert outcome("camel-ai", make, tmp_path) == (1, {"bad_row": 4})


def test_rows_that_are_no_objects_cost_themselves(tmp_path):
    rows = '[{"instruction": "q", "output": "a"}, 5, null, "x", [1], {"instruction": null, "output": "a"}]'
    assert outcome("goat", lambda source: write(source / "dataset.json", rows), tmp_path)[1] == {"bad_row": 4}


def test_a_text_set_takes_the_first_form_whose_columns_a_row_has(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = lines({"messages": turns}, {"prompt": "q", "response": "a"}, {"question": "q"})
    source = tmp_path / "source"
    write(source / "THUDM/LongCite-45k/long.jsonl", rows)
    [tally] = prepare(RECIPES["Long"], source, tmp_path / "root", Settings()).values()
    assert (tally.samples, dict(tally.rejected)) == (2, {"bad_row": 1})


# -- one's own -----------------------------------------------------------------------------------------------


def own(files: dict[str, bytes | str]) -> Callable[[Path], None]:
    def make(source: Path) -> None:
        for name, content in files.items():
            write(source / name, content)

    return make


CLIPS: dict[str, bytes | str] = {"a.wav": clip(1), "b c.wav": clip(2)}


def listed(text: str, encoding: str = "utf-8-sig") -> bytes:
    """A table with this text for the first clip."""
    return f'path,text\na.wav,{text}\n"b c.wav",{OTHER}\n'.encode(encoding)


FOLDERS: dict[str, tuple[dict[str, bytes | str] | bytes, tuple[int, dict[str, int]]]] = {
    "Windows table": (listed('"the ""quiet"", river"').replace(b"\n", b"\r\n"), (2, {})),
    "another encoding": (listed("caf\xe9", "latin-1"), (1, {"bad_row": 1})),
    "a huge cell": (listed("x y " * 90_000), (1, {"doubled_text": 1})),
    "a text that is none": (CLIPS | {"a.txt": b"\xff\xfe\0", "b c.txt": TEXT}, (1, {"no_transcript": 1})),
    "segments": (
        {
            "a.wav": clip(1), "wav.scp": "r a.wav\r\n", "text": "".join(f"r-{n} {TEXT}\r\n" for n in range(4)),
            "segments": "r-0 r 0 x\nr-1 r 1 0.5\nr-2 r nan 1\nr-3 r 0 1.5\n",
        },
        (1, {"bad_row": 3}),
    ),
    "cues": (
        {
            "a.wav": clip(1, "wav", 4.0),
            "a.vtt": f"\ufeffWEBVTT\r\n\r\n00:00.000 --> 00:02.000\r\n{TEXT}\r\n\r\n"
            f"00:03.000 --> 00:02.000\r\n{OTHER}\r\n\r\n00:09.000 --> 00:12.000\r\n{OTHER}\r\n",
        },
        (1, {"too_short": 2}),
    ),
    "odd names": ({"a\nb.wav": clip(1), "a\nb.txt": TEXT, "-rf.wav": clip(2), "-rf.txt": OTHER}, (2, {})),
    "subtitles that are no text": ({"a.wav": clip(1), "a.vtt": b"\xff\xfe\0"}, (0, {"no_transcript": 1})),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_odd_files_of_a_folder_cost_themselves(case, tmp_path):
    files, expected = FOLDERS[case]
    files = CLIPS | {"list.csv": files} if isinstance(files, bytes) else files
    assert outcome("own", own(files), tmp_path) == expected


def test_links_in_a_circle_and_to_nothing_do_no_harm(tmp_path):
    def make(source: Path) -> None:
        own({"r/a.wav": clip(1), "r/a.txt": TEXT, "dead.txt": TEXT})(source)
        (source / "circle").symlink_to(source)
        (source / "dead.wav").symlink_to("/nowhere")

    assert outcome("own", make, tmp_path) == (1, {"audio_missing": 1})


def test_a_quote_that_is_not_closed_loses_no_rows_in_silence(tmp_path):
    table = f'path,text\na.wav,"{TEXT}\nb c.wav,{TEXT}\n'
    with pytest.raises(
        SourceError, match=r"^\S+l\.csv: cannot be read: a quote is not closed in the row 'a\.wav,[^\n]*$"
    ):
        outcome("own", own(CLIPS | {"l.csv": table}), tmp_path)
