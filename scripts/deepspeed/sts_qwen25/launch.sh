#!/usr/bin/env bash
# The common part of the stage scripts: paths, processes and the launch.
# A stage script sets its own defaults, then sources this file. Every variable below can be set
# in the environment; flags after SEQ_LENGTH and TIMESTAMP go to tools/finetune_sts.py unchanged
# and override the defaults.
#
#   bash finetune_glm4voice_stage1.sh [SEQ_LENGTH] [TIMESTAMP] [flags of tools/finetune_sts.py]
#
# SEQ_LENGTH defaults to 32768 and TIMESTAMP to the date and hour, as in the published scripts. The paper's rows have
# 8192 tokens in stages 1 to 3 and 2048 in stage 4. Give the same TIMESTAMP to all stages of a run: they find
# each other by it.
#
# DRY_RUN=1 prints the command, every hyperparameter with its source, what trains, the data and the plan, and starts
# nothing. PREFLIGHT=1 checks the cluster first and trains if all is well; scripts/preflight.sh only checks.
set -euo pipefail

TYPED=("$@")
SEQ_LENGTH=
TIMESTAMP=
for positional in SEQ_LENGTH TIMESTAMP; do
  if [[ $# -gt 0 && $1 != --* ]]; then
    printf -v "$positional" %s "$1"
    shift
  fi
done
SEQ_LENGTH=${SEQ_LENGTH:-32768}
TIMESTAMP=${TIMESTAMP:-$(date +%Y%m%d_%H0000)}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
STAGE_NAME=$(basename "$0" .sh)

# ROOT_PATH holds models, data and results; LOCAL_ROOT_PATH is scratch space of this machine, for caches only.
ROOT_PATH=${ROOT_PATH:-$REPOSITORY}
export ROOT_PATH
if [[ -n ${LOCAL_ROOT_PATH:-} ]]; then
  export HF_DATASETS_CACHE=${HF_DATASETS_CACHE:-$LOCAL_ROOT_PATH/cache/datasets}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$LOCAL_ROOT_PATH/cache/torch_extensions}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LOCAL_ROOT_PATH/cache/triton}
fi
OUTPUT_ROOT=${OUTPUT_ROOT:-$ROOT_PATH/output/LM}
OUTPUT_DIR=${OUTPUT_DIR:-$OUTPUT_ROOT/$STAGE_NAME/$TIMESTAMP}

# A stage starts from the result of the previous one, run under the same TIMESTAMP.
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
  chosen=()
  choose() { # VARIABLE VALUE, unless it is set
    [[ -z ${!1:-} ]] || return 0
    printf -v "$1" %s "$2"
    chosen+=("$1=$2")
  }
  choose NPROC_PER_NODE 2
  choose BF16 False
  choose DATALOADER_NUM_WORKERS 1
  choose GRADIENT_ACCUMULATION_STEPS 1
  echo "no GPU here: ${chosen[*]:+${chosen[*]}, }PyTorch's Adam and gloo; each variable can be set" >&2
  # finetune_sts.py uses PyTorch's Adam on CPUs: DeepSpeed's own would have to be compiled.
  DEVICE_FLAGS=(--use_cpu True --ddp_backend gloo)
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${PYTHON:-python}

LR_SCHEDULER_TYPE=${LR_SCHEDULER_TYPE:-warmup_cosine}
if [[ -z ${LR_SCHEDULER_KWARGS:-} ]]; then
  case $LR_SCHEDULER_TYPE in
    warmup_cosine) LR_SCHEDULER_KWARGS="{\"cos_min_ratio\": ${MIN_LR_RATIO:-0.1}}" ;;
    *_with_min_lr) LR_SCHEDULER_KWARGS="{\"min_lr_rate\": ${MIN_LR_RATIO:-0.1}}" ;;
    # A plain --lr_scheduler_type cosine is the published flag and means the DeepSpeed config's scheduler.
    cosine) LR_SCHEDULER_KWARGS='{"num_cycles": 0.5}' ;;
  esac
fi
read -r -a RATIO <<<"${TEXT_AUDIO_INTERVAL_RATIO:-1 10 4 10}"

OPTIONAL_FLAGS=()
[[ -n ${AUDIO_TOKEN_CACHE:-} ]] && OPTIONAL_FLAGS+=(--audio_token_cache "$AUDIO_TOKEN_CACHE")
[[ -n ${SAVE_AT:-} ]] && OPTIONAL_FLAGS+=(--save_at "$SAVE_AT")
[[ -n ${TORCH_COMPILE:-} ]] && OPTIONAL_FLAGS+=(--torch_compile "$TORCH_COMPILE")
[[ -n ${CHECKPOINTED_LAYERS:-} ]] && OPTIONAL_FLAGS+=(--checkpointed_layers "$CHECKPOINTED_LAYERS")
[[ -n ${HANG_MINUTES:-} ]] && OPTIONAL_FLAGS+=(--hang_minutes "$HANG_MINUTES")
[[ -n ${LR_SCHEDULER_KWARGS:-} ]] && OPTIONAL_FLAGS+=(--lr_scheduler_kwargs "$LR_SCHEDULER_KWARGS")
[[ -n ${AUDIO_FEATURE_CACHE:-} ]] && OPTIONAL_FLAGS+=(--audio_feature_cache "$AUDIO_FEATURE_CACHE")
AUDIO_MODEL_NAME_OR_PATH=${AUDIO_MODEL_NAME_OR_PATH:-${DEFAULT_AUDIO_MODEL:+$ROOT_PATH/$DEFAULT_AUDIO_MODEL}}
[[ -n $AUDIO_MODEL_NAME_OR_PATH ]] && OPTIONAL_FLAGS+=(--audio_model_name_or_path "$AUDIO_MODEL_NAME_OR_PATH")

COMMAND=(
  "$PYTHON" "$REPOSITORY/vita_audio/cli/launch.py" "${RENDEZVOUS[@]}" --nproc_per_node "$NPROC_PER_NODE"
  "$REPOSITORY/tools/finetune_sts.py"
  --model_name_or_path "$MODEL_NAME_OR_PATH"
  --num_nextn_predict_layers "$NUM_HEADS"
  --language_model_freeze "$LANGUAGE_MODEL_FREEZE"
  --audio_model_freeze "${AUDIO_MODEL_FREEZE:-True}"
  --attn_implementation "${ATTN_IMPLEMENTATION:-auto}"
  --audio_tokenizer_type "${AUDIO_TOKENIZER_TYPE:-$DEFAULT_AUDIO_TOKENIZER_TYPE}"
  --audio_tokenizer_path "$AUDIO_TOKENIZER_PATH"
  --text_audio_interval_ratio "${RATIO[@]}"
  --dataset_name "$DATASET_NAME"
  --data_root "$DATA_ROOT"
  --model_max_length "$SEQ_LENGTH"
  --max_error_share "${MAX_ERROR_SHARE:-0.05}"
  --output_dir "$OUTPUT_DIR"
  --deepspeed "$DEEPSPEED_CONFIG"
  --max_steps "$MAX_STEPS"
  --learning_rate "$LEARNING_RATE"
  --mtp_learning_rate_multiplier "${MTP_LEARNING_RATE_MULTIPLIER:-1}"
  --weight_decay "$WEIGHT_DECAY" --decay_norms "${DECAY_NORMS:-False}"
  --loss_average "${LOSS_AVERAGE:-global}"
  --per_device_train_batch_size "${PER_DEVICE_TRAIN_BATCH_SIZE:-1}"
  --gradient_accumulation_steps "${GRADIENT_ACCUMULATION_STEPS:-16}"
  --adam_beta1 "${ADAM_BETA1:-0.9}" --adam_beta2 "${ADAM_BETA2:-0.95}" --adam_epsilon "${ADAM_EPSILON:-1e-8}"
  --max_grad_norm "${MAX_GRAD_NORM:-1.0}"
  --lr_scheduler_type "$LR_SCHEDULER_TYPE"
  --warmup_ratio "${WARMUP_RATIO:-0.03}"
  --bf16 "${BF16:-True}"
  --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}"
  --gradient_checkpointing_kwargs '{"use_reentrant": false}'
  --seed "${SEED:-42}" --data_seed "${DATA_SEED:-42}"
  --dataloader_num_workers "${DATALOADER_NUM_WORKERS:-$DEFAULT_DATALOADER_NUM_WORKERS}"
  --save_strategy steps --save_steps "${SAVE_STEPS:-0.1}" --save_total_limit "${SAVE_TOTAL_LIMIT:-2}"
  --logging_steps "${LOGGING_STEPS:-1}" --report_to "${REPORT_TO:-tensorboard}"
  --ddp_timeout "${DDP_TIMEOUT:-7200}"
  "${DEVICE_FLAGS[@]}" "${OPTIONAL_FLAGS[@]}" "$@"
)
if [[ ${DRY_RUN:-0} == 1 ]]; then
  exec "$PYTHON" -m vita_audio.cli.dry_run "${TYPED[@]}" -- "${COMMAND[@]}"
fi

if [[ -n ${PREFLIGHT:-} && ${PREFLIGHT:-} != 0 ]]; then
  "${COMMAND[@]/#"$REPOSITORY/tools/finetune_sts.py"/"$REPOSITORY/tools/preflight.py"}"
  [[ $PREFLIGHT != only ]] || exit 0
fi

# The output folder also keeps the settings of the run and, for each node, all printed output.
if ! mkdir -p "$OUTPUT_DIR" 2>/dev/null; then
  echo "error: OUTPUT_DIR=$OUTPUT_DIR: cannot be created; choose another OUTPUT_DIR, OUTPUT_ROOT or ROOT_PATH" >&2
  exit 1
fi
if [[ $NODE_RANK == 0 ]]; then
  for file in "$0" "$DATASET_NAME"; do
    copy=$OUTPUT_DIR/$(basename "$file")
    [[ ! -f $file || $file -ef $copy ]] || cp -f "$file" "$copy"
  done
fi
LOG_FILE=$OUTPUT_DIR/log_node$NODE_RANK.txt
# tee must outlive all processes, so it ignores signals and ends when the last one closes the pipe.
exec > >(trap '' INT TERM HUP USR1 && exec tee -a "$LOG_FILE") 2> >(trap '' INT TERM HUP USR1 && exec tee -a "$LOG_FILE" >&2)
echo "$STAGE_NAME: $MODEL_NAME_OR_PATH -> $OUTPUT_DIR ($NNODES x $NPROC_PER_NODE processes)"

exec "${COMMAND[@]}"
