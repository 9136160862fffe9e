"""Options that change how a step is computed and not what it computes, each with its check."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

ALL, AUTO = "all", "auto"
"""Values of ``--checkpointed_layers`` that are no numbers."""
_COMPILATION = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


@dataclass
class StepArguments(TrainingArguments):
    """transformers' own options and those of a step. A base of the stage's options."""

    checkpointed_layers: str = field(
        default=ALL,
        metadata={
            "help": "With --gradient_checkpointing: how many layers recompute their activations. all; a number: the "
            "first ones; auto: as few as fit the GPU's memory by the plan."
        },
    )
    gpu_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Memory of a GPU for --checkpointed_layers auto, in GB (default: that of the GPU here)."
        },
    )
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
        layers = self.checkpointed_layers
        if layers not in (ALL, AUTO) and not layers.isdecimal():
            return f"--checkpointed_layers {layers}: give {ALL}, {AUTO}, or a number of layers"
        if layers != ALL and not self._checkpoints:
            return f"--checkpointed_layers {layers}: also give --gradient_checkpointing True"
        if self.gpu_memory_gb is not None and not self.gpu_memory_gb > 0:
            return f"--gpu_memory_gb {self.gpu_memory_gb}: give GB, more than 0"
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if layers == AUTO and self.gpu_memory_gb is None and not on_gpu:
            return f"--checkpointed_layers {AUTO}: there is no GPU here; give --gpu_memory_gb, or a number of layers"
        self.torch_compile = bool(self.torch_compile or self.torch_compile_backend or self.torch_compile_mode)
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
        return None

    @property
    def _checkpoints(self) -> bool:
        """Whether gradient checkpointing is on, by either of its names."""
        return bool(self.gradient_checkpointing or getattr(self, "activation_checkpointing", None))

    @property
    def chooses_checkpointed_layers(self) -> bool:
        """Whether the plan decides how many layers recompute their activations."""
        return self._checkpoints and self.checkpointed_layers == AUTO

    @property
    def fixed_checkpointed_layers(self) -> int | None:
        """How many layers recompute their activations if the plan does not decide; None: all."""
        if not self._checkpoints:
            return 0
        return None if self.checkpointed_layers in (ALL, AUTO) else int(self.checkpointed_layers)

    @property
    def gpu_memory_bytes(self) -> float:
        """Memory of the GPU that is planned for."""
        if self.gpu_memory_gb is not None:
            return self.gpu_memory_gb * 1e9
        return float(torch.cuda.get_device_properties(self.device).total_memory)

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
