"""What each stage trains, with which options, in which loop."""

from vita_audio.training.arguments import DataArguments, ModelArguments, StageArguments
from vita_audio.training.checkpoints import last_complete_checkpoint
from vita_audio.training.stages import apply_stage, parameter_groups
from vita_audio.training.trainer import SpeechTrainer

__all__ = [
    "DataArguments",
    "ModelArguments",
    "SpeechTrainer",
    "StageArguments",
    "apply_stage",
    "last_complete_checkpoint",
    "parameter_groups",
]
