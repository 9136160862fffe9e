"""Results as web pages: ``results.html`` with a table for each test set, and a page for each set of a row.

A page of a set has every utterance: its sound, what was wanted, what the model wrote and what is heard in it, with
the words that differ in colour. Sounds stay in their WAV files, so pages are small; a folder can be moved as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jiwer
from markupsafe import Markup, escape

from vita_audio.evaluation.answers import contains_answer
from vita_audio.evaluation.metrics import word_tokens
from vita_audio.files import read_json_lines, write_text

_TEMPLATES = Path(__file__).parent / "templates"


def write_results(folder: Path, title: str, tables: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """Write ``results.html``.

    Args:
        tables: ``{title, columns, rows}``; a row has ``cells`` (``{text, interval}``), ``page`` and ``published``.
    """
    write_text(folder / "results.html", _render("results.html", title=title, tables=tables, notes=notes))


def write_utterances(folder: Path, name: str, title: str, results: Path) -> Path | None:
    """Write ``NAME.html`` from ``NAME.jsonl``; None if there are no utterances.

    Args:
        results: folder of ``results.html``.
    """
    source, target = folder / f"{name}.jsonl", folder / f"{name}.html"
    if not source.is_file():
        return None
    if not target.is_file() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
        shown = [_shown(utterance) for utterance in read_json_lines(source)]
        back = f"{os.path.relpath(results, folder)}/results.html"
        # What went wrong first.
        shown.sort(key=lambda one: (not one["failure"], not one["wrong"]))
        write_text(target, _render("utterances.html", title=title, utterances=shown, back=back))
    return target


def coloured(reference: str, said: str) -> tuple[Markup, Markup]:
    """Both texts with the tokens that only one of them has marked as deleted or inserted."""
    wanted, found = reference.split(), said.split()
    if len(wanted) <= 1 and not reference.isascii():  # scripts without spaces
        wanted, found = word_tokens(reference, case_sensitive=True), word_tokens(said, case_sensitive=True)
    if not wanted or not found:
        return _marked("del", " ".join(wanted), True), _marked("ins", " ".join(found), True)
    bare, bare_said = (" ".join(map(_bare, words)) for words in (wanted, found))
    (chunks,) = jiwer.process_words(bare, bare_said).alignments
    left, right = [], []
    for chunk in chunks:
        differs = chunk.type != "equal"
        left += [_marked("del", word, differs) for word in wanted[chunk.ref_start_idx : chunk.ref_end_idx]]
        right += [_marked("ins", word, differs) for word in found[chunk.hyp_start_idx : chunk.hyp_end_idx]]
    return Markup(" ").join(left), Markup(" ").join(right)


def _bare(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def _marked(tag: str, word: str, differs: bool) -> Markup:
    return Markup(f"<{tag}>{{}}</{tag}>").format(word) if differs and word else escape(word)


def _shown(utterance: dict[str, Any]) -> dict[str, Any]:
    reference = utterance["reference"]
    said = utterance["text"] if utterance["heard"] is None else utterance["heard"]
    if isinstance(reference, list):
        right = contains_answer(said, reference)
        wanted, marked, wrong = (
            Markup(" · ").join(map(escape, reference)),
            _marked("ins", said, not right),
            not right,
        )
    else:
        wanted, marked = coloured(reference, said)
        wrong = "<del>" in wanted or "<ins>" in marked
    return {"quality": None, **utterance, "wanted": wanted, "marked": marked, "wrong": wrong}


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(_TEMPLATES)
    )
    return environment.get_template(template).render(**values)
