"""Pages of utterances: what differs is coloured, what went wrong comes first."""

from __future__ import annotations

import json

import pytest

from vita_audio.evaluation.pages import coloured, write_utterances


@pytest.mark.parametrize(
    ("wanted", "said", "left", "right"),
    [
        ("the sea is blue", "the sea was blue", "the sea <del>is</del> blue", "the sea <ins>was</ins> blue"),
        ("Well, yes!", "well yes", "Well, yes!", "well yes"),
        ("a b c", "a c", "a <del>b</del> c", "a c"),
        ("a c", "a b c", "a c", "a <ins>b</ins> c"),
        ("你好吗", "你好", "你 好 <del>吗</del>", "你 好"),
        ("a <b> & c", "", "<del>a &lt;b&gt; &amp; c</del>", ""),
        ("a", "<script>", "<del>a</del>", "<ins>&lt;script&gt;</ins>"),
    ],
)
def test_words_of_only_one_side_are_marked(wanted, said, left, right):
    assert tuple(map(str, coloured(wanted, said))) == (left, right)


def test_errors_come_first_and_every_utterance_can_be_heard(tmp_path):
    base = {"heard": None, "wav": None, "similarity": None, "failure": None, "marks": {}}
    lines = [
        base
        | {
            "id": "id-right",
            "reference": ["yes", "yeah"],
            "text": "yes",
            "heard": "yes",
            "wav": "wav/s/a b.wav",
        },
        base | {"id": "id-wrong", "reference": "one", "text": "two", "similarity": 0.5},
        base | {"id": "id-broken", "reference": "one", "text": "", "failure": "no such file"},
    ]
    (tmp_path / "row").mkdir()
    (tmp_path / "row" / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_utterances(tmp_path / "row", "set", "A <set>", tmp_path).read_text()
    assert page.index("id-broken") < page.index("id-wrong") < page.index("id-right")
    assert 'src="wav/s/a%20b.wav"' in page
    assert 'href="../results.html"' in page
    assert "A &lt;set&gt;" in page
    assert "SIM 0.500" in page
    assert "failed: no such file" in page
    assert write_utterances(tmp_path / "row", "none", "t", tmp_path) is None
