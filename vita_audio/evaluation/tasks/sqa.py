"""Question answering: whether the answer occurs in the model's text and in its speech.

Spoken questions (speech QA) yield S→T and S→S, typed ones T→T and T→S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vita_audio.evaluation.answers import answer_words, contains_answer
from vita_audio.evaluation.benchmarks import Bench, BenchmarkItem, Utterance, read_test_set
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

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """Accuracies as fractions of all questions.

        ``..._s2t_accuracy`` and ``..._s2s_accuracy`` (``t2t`` and ``t2s`` for typed questions) use the published
        containment rule, but a reply without speech is wrong in the second instead of being left out (bug 17
        of the data specification). ``..._whole_words`` use the strict rule, by which "eighteen" does not
        contain "eight".
        """
        need_utterances(utterances)
        return {
            **{
                f"{self._key(said)}{suffix}": self._accuracy(utterances, said == "s", whole_words)
                for whole_words, suffix in ((False, ""), (True, "_whole_words"))
                for said in "ts"
            },
            f"{self.name}_questions": len(utterances),
            f"{self.name}_without_audio": sum(utterance.heard is None for utterance in utterances),
        }

    def _key(self, said: str) -> str:
        return f"{self.name}_{self.asked.lower()}2{said}_accuracy"

    @staticmethod
    def _accuracy(utterances: Sequence[Utterance], heard: bool, whole_words: bool) -> float:
        said = [utterance.heard if heard else utterance.text for utterance in utterances]
        correct = sum(
            text is not None and contains_answer(text, utterance.reference, whole_words=whole_words)
            for text, utterance in zip(said, utterances, strict=True)
        )
        return correct / len(utterances)

    def _check(self, item: BenchmarkItem) -> None:
        empty = next((answer for answer in item.answers if not answer_words(answer)), None)
        if empty is not None:
            raise ValueError(f"the answer {empty!r} contains no words, so every reply would be correct")
        if bool(item.conversation.messages[-1].num_audios) != (self.asked == "S"):
            spoken, typed = ("spoken", "typed") if self.asked == "S" else ("typed", "spoken")
            raise ValueError(f"the last question must be {spoken}; {typed} ones belong to another task")


SPEECH_QA = QuestionAnswering("sqa", "speech QA", "S")
TEXT_QA = QuestionAnswering("text_qa", "typed QA", "T")
