"""Options of the validation during a stage, each with its check. ``arguments.py`` has all others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class ValidationArguments:
    """The validation set, and what is spoken from it."""

    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "YAML file of a validation mix, scored every --eval_steps and at the end."},
    )
    eval_samples: int = field(
        default=512, metadata={"help": "Samples of the validation mix that are scored; always the same."}
    )
    eval_speech_samples: int = field(
        default=4,
        metadata={
            "help": "Requests of the validation mix (TTS and speech QA) that the model answers aloud, into TensorBoard."
        },
    )
    eval_speech_tokens: int = field(default=512, metadata={"help": "Tokens in the longest of these answers."})
    eval_flow_path: str | None = field(
        default=None, metadata={"help": "Folder of the codec's decoder, for codecs that have a separate one."}
    )
    eval_transcriber: str | None = field(
        default=None, metadata={"help": "Recogniser of these answers, as in evaluation; adds their WER."}
    )
    eval_transcriber_path: str | None = field(default=None, metadata={"help": "Folder of its weights."})
    eval_grammar: str | None = field(
        default=None, metadata={"help": "JSGF file that restricts the recogniser pocketsphinx."}
    )

    def check_validation(self) -> str | None:
        """An error message about the first option that cannot be used; None if there is none."""
        for name in ("eval_samples", "eval_speech_tokens"):
            if getattr(self, name) < 1:
                return f"--{name} {getattr(self, name)}: give 1 or more"
        if self.eval_speech_samples < 0:
            return f"--eval_speech_samples {self.eval_speech_samples}: give 0 or more"
        if self.eval_dataset_name is not None and not Path(self.eval_dataset_name).is_file():
            return f"--eval_dataset_name {self.eval_dataset_name}: no such file; give a mix's YAML"
        return None
