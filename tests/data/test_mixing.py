"""The mix: counts as the goldens have them, files that cannot be used, and the order of the stream."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vita_audio.chat import locate_file
from vita_audio.chat.sample import SampleError, parse_sample
from vita_audio.data.mixing import Mix, MixError, permuted, read_mix
from vita_audio.data.sources import Rows


@pytest.fixture(scope="module")
def mix_folder(goldens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    for name, text in json.loads((goldens.folder / "mixer" / "files.json").read_text()).items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def open_mix(mix_folder, arrow_cache):
    def open_mix(yaml: str, **options) -> Mix:
        file = mix_folder / "mix.yaml"
        file.write_text(yaml, encoding="utf-8")
        return Mix(read_mix(file), seed=42, cache_dir=arrow_cache, **options)

    return open_mix


def draws(mix: Mix, epoch: int = 0) -> list[tuple[str, int]]:
    """File stem and row of every sample of an epoch, in order."""
    places = [mix.place(position) for position in range(epoch * len(mix), (epoch + 1) * len(mix))]
    return [(mix.specs[place.source].path.stem, place.row) for place in places]


def test_counts_and_repetitions_equal_the_goldens_in_every_epoch(goldens, open_mix):
    for case in goldens.lines("mixer/cases.jsonl"):
        mix, expected = open_mix(case["yaml"]), case["expected"]
        assert len(mix) == expected["total"], case["name"]
        counts = [count for count in expected["counts_by_source_index"].values() if count]
        assert sorted(mix.used) == sorted(counts), case["name"]
        for epoch in range(3):
            by_file: dict[str, Counter] = {}
            for (stem, _), times in Counter(draws(mix, epoch)).items():
                by_file.setdefault(stem, Counter())[str(times)] += 1
            assert by_file == expected["multiplicity_histogram_by_file"], (case["name"], epoch)


# The golden files name an audio on each line without a tag for it, so a line that was read whole, with its
# audio, is refused for that and no other reason.
READ_WHOLE = "fewer_tags_than_audios"


@pytest.mark.parametrize(
    ("file", "outcomes"),
    [
        ("malformed", {READ_WHOLE: 5, "bad_json": 1}),
        ("mixed_content", {READ_WHOLE: 3, "wrong_type": 3}),
        ("mixed_id", {READ_WHOLE: 6}),
        ("mixed_audios", {READ_WHOLE: 6}),
        ("extra_message_key", {READ_WHOLE: 5}),
        ("conversations", {"good": 5}),
        ("late_error", {READ_WHOLE: 400, "wrong_type": 1}),
    ],
)
def test_a_broken_line_or_a_changing_column_invalidates_only_that_line(open_mix, file, outcomes):
    """The public code drops such files whole, or strips them of their audio."""
    mix = open_mix(MIX.format(paths=f"d/{file}.jsonl, d/qa.jsonl", more="ratio: 1"))
    found = Counter()
    for position in range(len(mix)):
        place = mix.place(position)
        if mix.specs[place.source].path.stem == file:
            try:
                parse_sample(mix.raw(place))
                found["good"] += 1
            except SampleError as error:
                found[error.reason] += 1
    assert found == outcomes


MIX = "dataset:\n  a:\n    data_paths: [{paths}]\n    {more}\n"


def test_missing_files_are_reported_together_and_refused_when_strict(open_mix, caplog):
    yaml = MIX.format(paths="d/gone.jsonl, d/qa.jsonl, d/lost.jsonl, d", more="ratio: 1")
    mix = open_mix(yaml)
    assert len(mix) == 9
    assert "3 files" in caplog.text
    with pytest.raises(MixError, match=r"(?s)3 files.*gone\.jsonl.*lost\.jsonl.*is a folder"):
        open_mix(yaml, strict=True)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        (MIX.format(paths="d/gone.jsonl", more="ratio: 1"), "no samples"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: -1"), "'ratio' must be a number of 0 or more"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: abc"), "'ratio' must be a number"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: .nan"), "'ratio' must be a number"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: .inf"), "'ratio' must be finite"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: 1e300"), "'ratio' must be finite and at most"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: 1:30"), "'ratio' must be a number"),
        (MIX.format(paths="d/qa.jsonl", more="num: 2020-13-45"), "'num' must be a number"),
        ("[" * 10_000, "cannot be read: nested too deeply"),
        (MIX.format(paths="d/qa.jsonl", more="num: -3"), "'num' must be a number"),
        (MIX.format(paths="d/qa.jsonl", more="ration: 1"), "unknown ration"),
        (MIX.format(paths="'${NOT_SET_ANYWHERE}/qa.jsonl'", more="ratio: 1"), "NOT_SET_ANYWHERE; export it"),
        ("dataset:\n  a:\n    ratio: 1.0\n", "'data_paths' must list"),
        (MIX.format(paths="''", more="ratio: 1"), "'data_paths' must list"),
        (MIX.format(paths="d/qa.jsonl", more="ratio: 1\n    ratio: 2"), "the key 'ratio' is given twice"),
        ("dataset: {a: {data_paths: [d/qa.jsonl]}, a: {data_paths: [d/qa.jsonl]}}", "key 'a' is given twice"),
        ("dataset: {}\n", "at least one data set"),
        ("dataset: [\n", "cannot be read"),
        ("just text\n", "needs a section 'dataset'"),
    ],
)
def test_an_invalid_mix_is_refused_in_one_line(open_mix, yaml, message):
    with pytest.raises(MixError, match=message.replace("(", r"\(")):
        open_mix(yaml)


def test_paths_expand_the_environment_and_start_at_the_data_root(mix_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SPEECH_ROOT", str(mix_folder))
    file = tmp_path / "mix.yaml"
    file.write_text(
        "dataset:\n  a:\n    data_paths: ['${SPEECH_ROOT}/d/qa.jsonl', d/qa.jsonl, $SPEECH_ROOT/x]\n"
    )
    paths = [spec.path for spec in read_mix(file, data_root="/elsewhere")]
    assert [str(path) for path in paths] == [
        f"{mix_folder}/d/qa.jsonl",
        "/elsewhere/d/qa.jsonl",
        f"{mix_folder}/x",
    ]
    assert read_mix(file)[1].path == tmp_path / "d/qa.jsonl"


def test_relative_data_files_are_found_below_the_root_or_next_to_the_mix(tmp_path, monkeypatch):
    monkeypatch.delenv("ROOT_PATH", raising=False)
    root, own = tmp_path / "root", tmp_path / "own"
    (root / "data").mkdir(parents=True)
    own.mkdir()
    for file in (root / "data" / "a.jsonl", root / "both.jsonl", own / "both.jsonl", own / "b.jsonl"):
        file.touch()
    mix = own / "mix.yaml"
    mix.write_text("dataset: {s: {data_paths: [datasets/a.jsonl, both.jsonl, b.jsonl, gone.jsonl]}}")
    found = [root / "data" / "a.jsonl", root / "both.jsonl", own / "b.jsonl", root / "gone.jsonl"]
    assert [spec.path for spec in read_mix(mix, root)] == found
    monkeypatch.setenv("ROOT_PATH", str(root))
    assert [spec.path for spec in read_mix(mix)] == found
    monkeypatch.delenv("ROOT_PATH")
    assert [spec.path for spec in read_mix(mix)][1:3] == [own / "both.jsonl", own / "b.jsonl"]


def test_a_key_without_a_value_counts_as_missing(open_mix):
    assert open_mix(MIX.format(paths="d/qa.jsonl", more="ratio:\n    num: null")).used == [9]


def test_numbers_may_have_an_exponent_without_a_point(tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text(MIX.format(paths="a.jsonl", more="ratio: 1e-1\n    num: 2E3"))
    [spec] = read_mix(mix)
    assert (spec.ratio, spec.num) == (0.1, 2000)


def test_a_leading_zero_is_not_octal_and_a_data_set_may_be_named_no(tmp_path):
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        f"dataset: {{no: {{data_paths: a.jsonl, num: 010}}, on: {{data_paths: a.jsonl, num: {'9' * 400}}}}}"
    )
    first, second = read_mix(mix)
    assert (first.dataset, first.num) == ("no", 10)
    assert (second.dataset, second.samples_per_epoch(7)) == ("on", 7)


@pytest.mark.parametrize("folder", ["data[1]", "data*", "da?a1", "{data1,x}", "[!x]ata1"])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_paths_are_literal(tmp_path, folder, suffix, text_sample, write_lines):
    import datasets

    for name in ("data1", folder):
        file = tmp_path / name / f"a.{suffix}"
        file.parent.mkdir()
        if suffix == "parquet":
            datasets.Dataset.from_list([text_sample(name)]).to_parquet(file)
        else:
            write_lines(file, [text_sample(name)])
        for cache in ("arrow", "arrow[1]"):
            rows = Rows(file, str(tmp_path / cache))
            assert [parse_sample(rows[row]).messages[0].content for row in range(len(rows))] == [name]


def test_every_epoch_has_its_own_order_and_the_same_seed_the_same(open_mix):
    yaml = MIX.format(paths="d/asr_a.jsonl, d/text.jsonl", more="ratio: 1")
    mix, again = open_mix(yaml), open_mix(yaml)
    assert draws(mix) == draws(again)
    assert draws(mix, 0) != draws(mix, 1)
    assert sorted(draws(mix, 0)) == sorted(draws(mix, 1))


def test_subsampling_reaches_every_row_in_later_epochs(open_mix):
    mix = open_mix(MIX.format(paths="d/text.jsonl", more="ratio: 0.1"))
    assert {draw for epoch in range(10) for draw in draws(mix, epoch)} == {("text", row) for row in range(50)}


def test_arrays_parquet_and_odd_lines_are_read(tmp_path, arrow_cache, text_sample, write_lines):
    import datasets

    samples = [text_sample(f"line\u2028separator {index}") for index in range(5)]
    (tmp_path / "array.json").write_text(
        "\ufeff [" + ",".join(map(json.dumps, samples)) + "]", encoding="utf-8"
    )
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    (tmp_path / "lines.jsonl").write_bytes(("\ufeff" + "\r\n\r\n".join(lines)).encode() + b"\n\n\xff\xfe\n")
    datasets.Dataset.from_list([{**sample, "audios": [], "id": 3} for sample in samples]).to_parquet(
        tmp_path / "rows.parquet"
    )
    for name, rows in (("array.json", 5), ("lines.jsonl", 6), ("rows.parquet", 5)):
        file = write_lines(tmp_path / "mix.yaml", [MIX.format(paths=name, more="ratio: 1")])
        mix = Mix(read_mix(file), 0, cache_dir=arrow_cache)
        assert len(mix) == rows
        contents, refusals = set(), []
        for position in range(rows):
            try:
                contents.add(parse_sample(mix.raw(mix.place(position))).messages[0].content)
            except SampleError as error:
                refusals.append(error.reason)
        assert refusals == ["bad_json"] * (rows - 5)
        assert contents == {sample["messages"][0]["content"] for sample in samples}, name


def test_a_lone_surrogate_in_an_array_invalidates_only_its_sample(tmp_path, arrow_cache, text_sample):
    samples = [text_sample("good"), text_sample("\ud800")]
    (tmp_path / "array.json").write_text(json.dumps(samples))
    rows = Rows(tmp_path / "array.json", arrow_cache)
    assert parse_sample(rows[0]).messages[0].content == "good"
    with pytest.raises(SampleError, match="not valid Unicode"):
        parse_sample(rows[1])


def test_a_changed_parquet_file_is_read_again(tmp_path, arrow_cache, text_sample):
    import datasets

    for name in ("one", "two"):  # of equal size
        datasets.Dataset.from_list([text_sample(name)]).to_parquet(tmp_path / "a.parquet")
        assert parse_sample(Rows(tmp_path / "a.parquet", arrow_cache)[0]).messages[0].content == name


def test_a_changed_file_is_read_again(tmp_path, arrow_cache, text_sample, write_lines):
    mix_file = write_lines(tmp_path / "mix.yaml", [MIX.format(paths="a.jsonl", more="ratio: 1")])
    for rows in (3, 4):
        write_lines(tmp_path / "a.jsonl", [text_sample("x")] * rows)
        assert len(Mix(read_mix(mix_file), 0, cache_dir=arrow_cache)) == rows


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_shuffle_is_a_permutation(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def published_mix(stage: int) -> list[tuple[str, float, float, str]]:
    """Set, ratio, num and file of every row of the published table."""
    table = Path(__file__).parents[1] / "goldens" / "recipe" / "published_mix.tsv"
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [
        (
            row["set"],
            float(row[f"stage{stage}_ratio"]),
            float(row[f"stage{stage}_num"] or math.inf),
            row["file"],
        )
        for row in rows
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_mixes_equal_the_published_ones_file_by_file(stage, monkeypatch):
    monkeypatch.delenv("ROOT_PATH", raising=False)
    path = Path(__file__).parents[2] / "configs" / f"sts_finetune_stage{stage}.yaml"
    specs = read_mix(path, "/data_root")
    got = [
        (spec.dataset, spec.ratio, spec.num, spec.path.relative_to("/data_root").as_posix()) for spec in specs
    ]
    assert got == published_mix(stage)
    assert (len({spec.dataset for spec in specs}), len(specs)) == (34, 116)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["xlsx_sample_num"] == 5


def test_datasets_below_the_root_also_means_its_data_folder(tmp_path):
    for folder in ("data", "beside"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / "a.jsonl").touch()
    (tmp_path / "beside" / "b.jsonl").touch()
    place = partial(locate_file, data_root=tmp_path, beside=tmp_path / "beside")
    assert place("datasets/a.jsonl") == str(tmp_path / "data" / "a.jsonl")
    assert place("b.jsonl") == str(tmp_path / "beside" / "b.jsonl")
    # What is nowhere was expected below the root, in the folder that is there.
    assert place("datasets/c.jsonl") == str(tmp_path / "data" / "c.jsonl")
    assert place("c.jsonl") == str(tmp_path / "c.jsonl")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "a.jsonl").touch()
    assert place("datasets/a.jsonl") == str(tmp_path / "datasets" / "a.jsonl")
    assert place("datasets/c.jsonl") == str(tmp_path / "datasets" / "c.jsonl")
    assert place("/absolute/d.jsonl") == "/absolute/d.jsonl"


def test_without_a_data_root_paths_are_relative_to_root_path_and_then_to_the_mix(tmp_path, monkeypatch):
    root, own = tmp_path / "root", tmp_path / "own"
    (root / "data").mkdir(parents=True)
    own.mkdir()
    (root / "data" / "a.jsonl").touch()
    (own / "b.jsonl").touch()
    mix = own / "mix.yaml"
    mix.write_text("dataset:\n  set:\n    data_paths: [datasets/a.jsonl, b.jsonl]\n")
    monkeypatch.setenv("ROOT_PATH", str(root))
    assert [spec.path for spec in read_mix(mix)] == [root / "data" / "a.jsonl", own / "b.jsonl"]
    monkeypatch.delenv("ROOT_PATH")
    assert [spec.path for spec in read_mix(mix)] == [own / "datasets" / "a.jsonl", own / "b.jsonl"]
