"""The options of LoRA (:mod:`vita_audio.training.lora`), each with its check."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from vita_audio.models.cost import PROJECTIONS


@dataclass(kw_only=True)
class LoraArguments:
    """Adapters on the backbone's projections. A base of the model's options."""

    lora_r: int = field(
        default=0,
        metadata={
            "help": "Rank of LoRA adapters, 8 to 64; the backbone stays frozen (stages 1 and 4). 0: no LoRA."
        },
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "Adapters are scaled by alpha / r (default: twice the rank)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapters' inputs."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(PROJECTIONS),
        metadata={
            "help": f"Projections of each layer that get an adapter (default: all): {' '.join(PROJECTIONS)}."
        },
    )
    lora_train_embeddings: bool | None = field(
        default=None,
        metadata={
            "help": "Also train token embedding and LM head, whole (default: if the stage adds tokens)."
        },
    )

    def check_lora(self, *, language_model_freeze: bool) -> None:
        """Check the options.

        Raises:
            ValueError: one cannot be used; the message names it and what to do.
        """
        if self.lora_r < 0:
            raise ValueError(f"--lora_r {self.lora_r}: give a rank, 1 or more, or 0 for no LoRA")
        if not self.lora_r:
            return
        if find_spec("peft") is None:
            raise ValueError("--lora_r needs PEFT: pip install peft")
        if language_model_freeze:
            raise ValueError(
                "--lora_r with --language_model_freeze: there is nothing to adapt, since heads train whole; "
                "leave one of the two out"
            )
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"--lora_alpha {self.lora_alpha}: give 1 or more")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout}: give a share, 0 or more and below 1")
        unknown = [name for name in self.lora_target_modules if name not in PROJECTIONS]
        if unknown or not self.lora_target_modules:
            raise ValueError(
                f"--lora_target_modules {' '.join(unknown)}: give some of {' '.join(PROJECTIONS)}"
            )

    @property
    def lora_scale(self) -> int:
        """``lora_alpha``, resolved."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
