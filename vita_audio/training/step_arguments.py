"""Options that change how a step is computed and not what it computes, each with its check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import TrainingArguments

_COMPILATION = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


@dataclass
class StepArguments(TrainingArguments):
    """transformers' own options and those of a step. A base of the stage's options."""

    trace_steps: int = field(
        default=0,
        metadata={
            "help": "Write a profiler trace of so many steps, from the third on, to OUTPUT_DIR/trace-RANK.json."
        },
    )

    def check_step(self) -> str | None:
        """Resolve these options; an error message about the first that cannot be used, None if there is none."""
        if self.trace_steps < 0:
            return f"--trace_steps {self.trace_steps}: give 0 or more"
        self.torch_compile = bool(self.torch_compile or self.torch_compile_backend or self.torch_compile_mode)
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
        return None

    @contextmanager
    def without_compilation(self) -> Iterator[None]:
        """Hide ``--torch_compile`` from transformers and accelerate, which would compile the model as a whole."""
        given = {name: getattr(self, name) for name in _COMPILATION}
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        try:
            yield
        finally:
            for name, value in given.items():
                setattr(self, name, value)
