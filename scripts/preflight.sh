#!/usr/bin/env bash
# Checks a cluster before a stage runs on it: vita_audio/cli/preflight.py says what. Trains nothing.
#   bash scripts/preflight.sh [STAGE_SCRIPT] [SEQ_LENGTH] [TIMESTAMP] [flags of tools/finetune_sts.py]
# STAGE_SCRIPT is the name of a script of scripts/deepspeed/sts_qwen25 (finetune_glm4voice_stage1 unless given);
# its variables hold here as well.
set -euo pipefail

stages=$(dirname "${BASH_SOURCE[0]}")/deepspeed/sts_qwen25
stage=finetune_glm4voice_stage1
if [[ ${1:-} == *finetune_* ]]; then
  stage=$(basename "$1" .sh)
  shift
fi
if [[ ! -f $stages/$stage.sh ]]; then
  echo "error: $stage: no such stage script; give one of $(cd "$stages" && echo finetune_*.sh)" >&2
  exit 1
fi
PREFLIGHT=only exec bash "$stages/$stage.sh" "$@"
