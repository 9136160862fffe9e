"""Question answering: whether the answer occurs in the model's text and in its speech.

Spoken questions (speech QA) yield S→T and S→S, typed ones T→T and T→S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vita_audio.evaluation.answers import answer_words, contains_answer
from vita_audio.evaluation.bench import Bench
from vita_audio.evaluation.items import BenchmarkItem, read_test_set
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.statistics import Mark, Marks, rates
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances


@dataclass(frozen=True)
class QuestionAnswering:
    """Questions of one kind.

    Attributes:
        name: ``sqa`` for spoken questions, ``text_qa`` for typed ones.
        asked: kind of the questions, S (spoken) or T (typed).
    """

    name: str
    title: str
    asked: str
    speaks: bool = True
    samples: bool = False
    open_system: bool = True

    @property
    def columns(self) -> tuple[Column, ...]:
        return tuple(
            Column(f"{self.asked}→{said.upper()}{words} %", f"{self._key(said)}{suffix}")
            for words, suffix in (("", ""), (" words", "_whole_words"))
            for said in "ts"
        )

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        """See :class:`~vita_audio.evaluation.tasks.task.Task`; the last content may be a list of answers."""
        return read_test_set(path, data_root, limit, answer_lists=True, check=self._check)

    def is_as_trained(self, item: BenchmarkItem) -> bool:
        """Whether the question is speech only, or text that does not begin or end with white space."""
        question = item.conversation.messages[-1]
        return question.texts == ("", "") if question.num_audios else question.text == question.text.strip()

    def run(self, bench: Bench, items: Sequence[BenchmarkItem]) -> list[Utterance]:
        """Answer every question aloud."""
        return bench.spoken(items, lambda item: list(item.answers))

    def marks(self, utterance: Utterance) -> Marks:
        """Whether each rule finds the answer.

        ``..._s2t_accuracy`` and ``..._s2s_accuracy`` (``t2t`` and ``t2s`` for typed questions) use the published
        containment rule, but a reply without speech is wrong in the second; ``..._answered`` leaves it out, as
        published (bug 17 of the data specification). ``..._whole_words`` use the strict rule, by which "eighteen" does
        not contain "eight".
        """
        marks: dict[str, Mark] = {}
        for said, text in (("t", utterance.text), ("s", utterance.heard)):
            for suffix, whole_words in (("", False), ("_whole_words", True)):
                right = text is not None and contains_answer(
                    text, utterance.reference, whole_words=whole_words
                )
                marks[f"{self._key(said)}{suffix}"] = (float(right), 1.0)
        if utterance.heard is not None:
            marks[f"{self._key('s')}_answered"] = marks[self._key("s")]
        return marks

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """The rates of :meth:`marks` as fractions, and the number of questions behind them."""
        need_utterances(utterances)
        return {
            **rates([self.marks(utterance) for utterance in utterances]),
            f"{self.name}_questions": len(utterances),
            f"{self.name}_without_audio": sum(utterance.heard is None for utterance in utterances),
        }

    def _key(self, said: str) -> str:
        return f"{self.name}_{self.asked.lower()}2{said}_accuracy"

    def _check(self, item: BenchmarkItem) -> None:
        empty = next((answer for answer in item.answers if not answer_words(answer)), None)
        if empty is not None:
            raise ValueError(f"the answer {empty!r} contains no words, so every reply would be correct")
        if bool(item.conversation.messages[-1].num_audios) != (self.asked == "S"):
            spoken, typed = ("spoken", "typed") if self.asked == "S" else ("typed", "spoken")
            raise ValueError(f"the last question must be {spoken}; {typed} ones belong to another task")


SPEECH_QA = QuestionAnswering("sqa", "speech QA", "S")
TEXT_QA = QuestionAnswering("text_qa", "typed QA", "T")
