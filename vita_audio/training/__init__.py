"""Training of a stage: options, trainable parameters and the training loop."""

from vita_audio.training.arguments import ArgumentError, DataArguments, ModelArguments, StageArguments
from vita_audio.training.checkpoints import last_complete_checkpoint
from vita_audio.training.continuation import describe_changes, fit_to_processes
from vita_audio.training.run_folder import RunFolder, check_input_folder
from vita_audio.training.stages import apply_stage, describe_trainable, parameter_groups
from vita_audio.training.trainer import SpeechTrainer

__all__ = [
    "ArgumentError",
    "DataArguments",
    "ModelArguments",
    "RunFolder",
    "SpeechTrainer",
    "StageArguments",
    "apply_stage",
    "check_input_folder",
    "describe_changes",
    "describe_trainable",
    "fit_to_processes",
    "last_complete_checkpoint",
    "parameter_groups",
]
