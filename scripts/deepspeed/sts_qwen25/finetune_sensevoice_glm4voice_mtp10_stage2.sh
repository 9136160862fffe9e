#!/usr/bin/env bash
# Plus, stage 4, supervised finetuning: model, adapter and heads train, the heads at ten times the rate.
#   bash finetune_sensevoice_glm4voice_mtp10_stage2.sh [SEQ_LENGTH] [TIMESTAMP] [flags]
# shellcheck disable=SC2034  # used by launch.sh
PREVIOUS_STAGE=finetune_sensevoice_glm4voice_mtp10_stage1
NUM_HEADS=${NUM_HEADS:-10}
LANGUAGE_MODEL_FREEZE=${LANGUAGE_MODEL_FREEZE:-False}
LEARNING_RATE=${LEARNING_RATE:-5e-5}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.1}
MAX_STEPS=${MAX_STEPS:-4000}
DATA_MIX=sts_finetune_stage2.yaml
DEFAULT_DEEPSPEED_CONFIG=ds_config_zero2_no_optimizer.json
DEFAULT_DATALOADER_NUM_WORKERS=2
DEFAULT_AUDIO_TOKENIZER_TYPE=sensevoice_glm4voice
DEFAULT_AUDIO_MODEL=models/FunAudioLLM/SenseVoiceSmall
MTP_LEARNING_RATE_MULTIPLIER=${MTP_LEARNING_RATE_MULTIPLIER:-10}
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
