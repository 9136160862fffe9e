#!/usr/bin/env bash
# Stage 1, alignment: Qwen2.5 learns to read and write speech tokens (in the paper SEQ_LENGTH 8192).
#   bash finetune_glm4voice_stage1.sh [SEQ_LENGTH] [TIMESTAMP] [flags]
# shellcheck disable=SC2034  # used by launch.sh
PREVIOUS_STAGE=
NUM_HEADS=${NUM_HEADS:-0}
LANGUAGE_MODEL_FREEZE=${LANGUAGE_MODEL_FREEZE:-False}
LEARNING_RATE=${LEARNING_RATE:-6e-5}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.0}
MAX_STEPS=${MAX_STEPS:-8000}
DATA_MIX=sts_finetune_stage1.yaml
DEFAULT_DEEPSPEED_CONFIG=ds_config_zero2.json
DEFAULT_DATALOADER_NUM_WORKERS=8
DEFAULT_AUDIO_TOKENIZER_TYPE=glm4voice
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
