#!/usr/bin/env bash
# Plus, stage 2: one MCTP head on the frozen model of stage 1 (in the paper SEQ_LENGTH 8192).
#   bash finetune_sensevoice_glm4voice_mtp1_stage1.sh [SEQ_LENGTH] [TIMESTAMP] [flags]
# shellcheck disable=SC2034  # used by launch.sh
PREVIOUS_STAGE=finetune_sensevoice_glm4voice_stage1
NUM_HEADS=${NUM_HEADS:-1}
LANGUAGE_MODEL_FREEZE=${LANGUAGE_MODEL_FREEZE:-True}
LEARNING_RATE=${LEARNING_RATE:-1e-3}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.0}
MAX_STEPS=${MAX_STEPS:-4000}
DATA_MIX=sts_finetune_stage1.yaml
DEFAULT_DEEPSPEED_CONFIG=ds_config_zero2.json
DEFAULT_DATALOADER_NUM_WORKERS=8
DEFAULT_AUDIO_TOKENIZER_TYPE=sensevoice_glm4voice
DEFAULT_AUDIO_MODEL=models/FunAudioLLM/SenseVoiceSmall
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
