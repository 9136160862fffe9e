#!/usr/bin/env bash
# Stage 3: ten MCTP heads, grown from the one of stage 2 (in the paper SEQ_LENGTH 8192).
#   bash finetune_glm4voice_mtp10_stage1.sh [SEQ_LENGTH] [TIMESTAMP] [flags]
# shellcheck disable=SC2034  # used by launch.sh
PREVIOUS_STAGE=finetune_glm4voice_mtp1_stage1
NUM_HEADS=${NUM_HEADS:-10}
LANGUAGE_MODEL_FREEZE=${LANGUAGE_MODEL_FREEZE:-True}
LEARNING_RATE=${LEARNING_RATE:-1e-3}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.0}
MAX_STEPS=${MAX_STEPS:-8000}
DATA_MIX=sts_finetune_stage1.yaml
DEFAULT_DEEPSPEED_CONFIG=ds_config_zero2.json
DEFAULT_DATALOADER_NUM_WORKERS=8
DEFAULT_AUDIO_TOKENIZER_TYPE=glm4voice
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
