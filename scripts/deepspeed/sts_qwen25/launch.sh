#!/usr/bin/env bash
# Common part of the stage scripts: where things are, how many processes, the launch itself.
# A stage script sets its own defaults, then sources this file. Every variable below can be set
# in the environment; flags after SEQ_LENGTH and TIMESTAMP go to tools/finetune_sts.py as they are
# and win over the defaults.
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: $(basename "$0") SEQ_LENGTH TIMESTAMP [flags of tools/finetune_sts.py]" >&2
  exit 2
fi
SEQ_LENGTH=$1
TIMESTAMP=$2
shift 2

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
STAGE_NAME=$(basename "$0" .sh)

# Where models and data are read (ROOT_PATH) and where results go (LOCAL_ROOT_PATH).
ROOT_PATH=${ROOT_PATH:-$REPOSITORY}
LOCAL_ROOT_PATH=${LOCAL_ROOT_PATH:-$ROOT_PATH}
export ROOT_PATH LOCAL_ROOT_PATH
OUTPUT_ROOT=${OUTPUT_ROOT:-$LOCAL_ROOT_PATH/output/LM}
OUTPUT_DIR=${OUTPUT_DIR:-$OUTPUT_ROOT/$STAGE_NAME/$TIMESTAMP}

# A stage starts from the result of the one before, run under the same TIMESTAMP.
if [[ -n ${PREVIOUS_STAGE:-} ]]; then
  MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-$OUTPUT_ROOT/$PREVIOUS_STAGE/$TIMESTAMP}
else
  MODEL_NAME_OR_PATH=${MODEL_NAME_OR_PATH:-$ROOT_PATH/models/Qwen/Qwen2.5-7B-Instruct}
fi
DATASET_NAME=${DATASET_NAME:-$REPOSITORY/configs/$DATA_MIX}
AUDIO_TOKENIZER_PATH=${AUDIO_TOKENIZER_PATH:-$ROOT_PATH/models/THUDM/glm-4-voice-tokenizer}
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-$REPOSITORY/scripts/deepspeed/$DEFAULT_DEEPSPEED_CONFIG}
DATA_ROOT=${DATA_ROOT:-$ROOT_PATH}

# Machines and processes.
# shellcheck source=../devices.sh
source "$REPOSITORY/scripts/deepspeed/devices.sh"
set_rendezvous 34567
GPUS=$(count_gpus)
if [[ $GPUS -gt 0 ]]; then
  NPROC_PER_NODE=${NPROC_PER_NODE:-$GPUS}
  DEVICE_FLAGS=(--ddp_backend nccl --tf32 "${TF32:-True}")
else
  NPROC_PER_NODE=${NPROC_PER_NODE:-2}
  DEVICE_FLAGS=(--use_cpu True --ddp_backend gloo)
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}

LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-cosine_with_min_lr}
if [[ -z ${LR_SCHEDULER_KWARGS:-} && $LR_SCHEDULER_TYPE == *_with_min_lr ]]; then
  LR_SCHEDULER_KWARGS="{\"min_lr_rate\": ${MIN_LR_RATIO:-0.1}}"
fi
read -r -a RATIO <<<"${TEXT_AUDIO_INTERVAL_RATIO:-1 10 4 10}"

OPTIONAL_FLAGS=()
[[ -n ${AUDIO_TOKEN_CACHE:-} ]] && OPTIONAL_FLAGS+=(--audio_token_cache "$AUDIO_TOKEN_CACHE")
[[ -n ${LR_SCHEDULER_KWARGS:-} ]] && OPTIONAL_FLAGS+=(--lr_scheduler_kwargs "$LR_SCHEDULER_KWARGS")
[[ -n ${AUDIO_FEATURE_CACHE:-} ]] && OPTIONAL_FLAGS+=(--audio_feature_cache "$AUDIO_FEATURE_CACHE")
AUDIO_MODEL_NAME_OR_PATH=${AUDIO_MODEL_NAME_OR_PATH:-${DEFAULT_AUDIO_MODEL:+$ROOT_PATH/$DEFAULT_AUDIO_MODEL}}
[[ -n $AUDIO_MODEL_NAME_OR_PATH ]] && OPTIONAL_FLAGS+=(--audio_model_name_or_path "$AUDIO_MODEL_NAME_OR_PATH")

mkdir -p "$OUTPUT_DIR"
echo "$STAGE_NAME: $MODEL_NAME_OR_PATH -> $OUTPUT_DIR ($NNODES x $NPROC_PER_NODE processes)"

exec "$PYTHON" "$REPOSITORY/vita_audio/cli/launch.py" "${RENDEZVOUS[@]}" --nproc_per_node "$NPROC_PER_NODE" \
  "$REPOSITORY/tools/finetune_sts.py" \
  --model_name_or_path "$MODEL_NAME_OR_PATH" \
  --num_nextn_predict_layers "$NUM_HEADS" \
  --language_model_freeze "$LANGUAGE_MODEL_FREEZE" \
  --audio_model_freeze "${AUDIO_MODEL_FREEZE:-True}" \
  --attn_implementation "${ATTN_IMPLEMENTATION:-auto}" \
  --audio_tokenizer_type "${AUDIO_TOKENIZER_TYPE:-$DEFAULT_AUDIO_TOKENIZER_TYPE}" \
  --audio_tokenizer_path "$AUDIO_TOKENIZER_PATH" \
  --text_audio_interval_ratio "${RATIO[@]}" \
  --dataset_name "$DATASET_NAME" \
  --data_root "$DATA_ROOT" \
  --model_max_length "$SEQ_LENGTH" \
  --max_error_share "${MAX_ERROR_SHARE:-0.05}" \
  --output_dir "$OUTPUT_DIR" \
  --deepspeed "$DEEPSPEED_CONFIG" \
  --max_steps "$MAX_STEPS" \
  --learning_rate "$LEARNING_RATE" \
  --mtp_learning_rate_multiplier "${MTP_LEARNING_RATE_MULTIPLIER:-1}" \
  --weight_decay "$WEIGHT_DECAY" \
  --per_device_train_batch_size "${PER_DEVICE_TRAIN_BATCH_SIZE:-1}" \
  --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-16}" \
  --adam_beta1 "${ADAM_BETA1:-0.9}" --adam_beta2 "${ADAM_BETA2:-0.95}" --adam_epsilon "${ADAM_EPSILON:-1e-8}" \
  --max_grad_norm "${MAX_GRAD_NORM:-1.0}" \
  --lr_scheduler_type "$LR_SCHEDULER_TYPE" \
  --warmup_steps "${WARMUP_RATIO:-0.03}" \
  --bf16 "${BF16:-True}" \
  --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}" \
  --gradient_checkpointing_kwargs '{"use_reentrant": false}' \
  --seed "${SEED:-42}" --data_seed "${DATA_SEED:-42}" \
  --dataloader_num_workers "${DATALOADER_NUM_WORKERS:-8}" \
  --save_strategy steps --save_steps "${SAVE_STEPS:-0.1}" --save_total_limit "${SAVE_TOTAL_LIMIT:-2}" \
  --logging_steps "${LOGGING_STEPS:-1}" --report_to "${REPORT_TO:-tensorboard}" \
  --ddp_timeout "${DDP_TIMEOUT:-7200}" \
  "${DEVICE_FLAGS[@]}" "${OPTIONAL_FLAGS[@]}" "$@"
