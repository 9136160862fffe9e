#!/usr/bin/env bash
# Scores checkpoints on ASR, TTS and question-answering test sets:
#   bash scripts/deepspeed/evaluate_sts.sh [TIMESTAMP] [flags of tools/evaluate_table.py]
#   bash scripts/deepspeed/evaluate_sts.sh [TIMESTAMP] --speed [flags of tools/benchmark.py paper-speed]
#
# Which checkpoints (one of):
#   MODEL_NAME_OR_PATH   a checkpoint folder, or several as "NAME=DIR NAME=DIR@vanilla,turbo"
#   STAGES_ROOT          folder that the stage scripts wrote to (their OUTPUT_ROOT): all four stages; with
#                        STAGE_PREFIX (glm4voice or sensevoice_glm4voice) and TIMESTAMP (default: the newest run)
#   neither              the last stage below $ROOT_PATH/output/LM
# Which codec:           AUDIO_TOKENIZER_TYPE AUDIO_TOKENIZER_PATH FLOW_PATH AUDIO_MODEL_NAME_OR_PATH
# Which test sets (default: BENCHMARKS=paper):
#   BENCHMARKS           of configs/benchmarks/, by name, separated by spaces; paper: all that are below $ROOT_PATH;
#                        or YAML files of the same form. Each has its own decoding, recogniser and metric
#   ASR_JSON TTS_JSON SQA_JSON TEXT_QA_JSON SEED_TTS_LIST   files, several separated by spaces, each FILE or NAME=FILE
#   CORPUS               the quickstart's corpus, by configs/quickstart/benchmarks.yaml
#   DATA_ROOT for relative audio paths; LIMIT items of each set
# Which recogniser (default: the benchmark's): TRANSCRIBER (pocketsphinx, whisper, paraformer, sensevoice, command)
#                        TRANSCRIBER_PATH GRAMMAR LANGUAGE_CODE; CHINESE_TRANSCRIBER CHINESE_TRANSCRIBER_PATH (for
#                        Mandarin Seed-TTS); SPEAKER_MODEL (wavlm, spectral, none) SPEAKER_MODEL_PATH;
#                        QUALITY_MODEL (dnsmos)
# Also:                  MODES DECODING (greedy, published or both) OUTPUT_DIR SYSTEM_PROMPT (auto, omni, luke, none, or
#                        a text) BATCH_SIZE MAX_NEW_TOKENS SAMPLES SPEED_ITEMS TEXT_NORMALISER (words, libritts, …);
#                        EVALUATION_PROCESSES (default: one per GPU, one without) and NNODES NODE_RANK MASTER_ADDR
#                        MASTER_PORT as in the stage scripts
#
# Writes OUTPUT_DIR/results.json, results.md, results.html, run.json, and every utterance with its WAV file.
#
# --tradeoff also scores lossless decoding and speech rows, and writes tradeoff.md, .png and .svg: quality against speed.
#
# --speed measures instead, as the paper: 4096 tokens (TOKENS) by size and mode, the first chunk after 32 tokens of prompt,
# the cost of a head, and the seconds of each chunk, into OUTPUT_DIR/speed/. SIZES (default: 0.5b 1.5b 3b 7b, with random
# weights), or one MODEL_NAME_OR_PATH; with QUESTION, a WAV file, its answer is also timed through the codec.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() {
  echo "error: $*" >&2
  exit 1
}

if [[ $# -gt 0 && $1 != -* ]]; then
  TIMESTAMP=$1
  shift
fi
speed=
if [[ ${1:-} == --speed ]]; then
  speed=yes
  shift
fi
ROOT_PATH=${ROOT_PATH:-$REPOSITORY}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT_PATH/output/evaluation${TIMESTAMP:+/$TIMESTAMP}}
AUDIO_TOKENIZER_TYPE=${AUDIO_TOKENIZER_TYPE:-${STAGE_PREFIX:-glm4voice}}
if [[ $AUDIO_TOKENIZER_TYPE == sensevoice_* ]]; then
  AUDIO_MODEL_NAME_OR_PATH=${AUDIO_MODEL_NAME_OR_PATH:-$ROOT_PATH/models/FunAudioLLM/SenseVoiceSmall}
fi
AUDIO_TOKENIZER_PATH=${AUDIO_TOKENIZER_PATH:-$ROOT_PATH/models/THUDM/glm-4-voice-tokenizer}
if [[ $AUDIO_TOKENIZER_TYPE == *glm4voice ]]; then
  FLOW_PATH=${FLOW_PATH:-$ROOT_PATH/models/THUDM/glm-4-voice-decoder}
fi

export TOKENIZERS_PARALLELISM=false PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}

# -- speed ----------------------------------------------------------------------------------------------

if [[ -n $speed ]]; then
  options=(--output_dir "$OUTPUT_DIR/speed" --tokens "${TOKENS:-4096}")
  if [[ -n ${MODEL_NAME_OR_PATH:-} ]]; then
    model=${MODEL_NAME_OR_PATH#*=}
    options+=(--model "${model%@*}")
  else
    read -r -a sizes <<<"${SIZES:-0.5b 1.5b 3b 7b}"
    options+=(--sizes "${sizes[@]}")
  fi
  if [[ -n ${MODES:-} ]]; then
    read -r -a modes <<<"$MODES"
    options+=(--modes "${modes[@]}")
  fi
  if [[ -n ${QUESTION:-} ]]; then
    options+=(--question "$QUESTION" --audio_tokenizer_type "$AUDIO_TOKENIZER_TYPE")
    options+=(--audio_tokenizer_path "$AUDIO_TOKENIZER_PATH")
    [[ -z ${FLOW_PATH:-} ]] || options+=(--flow_path "$FLOW_PATH")
    [[ -z ${AUDIO_MODEL_NAME_OR_PATH:-} ]] || options+=(--frontend_path "$AUDIO_MODEL_NAME_OR_PATH")
  fi
  exec "${PYTHON:-python}" "$REPOSITORY/tools/benchmark.py" paper-speed "${options[@]}" "$@"
fi

# -- checkpoints ----------------------------------------------------------------------------------------

run_folder() { # STAGE_NAME: the run of that stage with TIMESTAMP, else the newest
  local stage_folder=$STAGES_ROOT/finetune_${STAGE_PREFIX:-glm4voice}_$1 candidate
  if [[ -n ${TIMESTAMP:-} ]]; then
    echo "$stage_folder/$TIMESTAMP"
    return
  fi
  # shellcheck disable=SC2012  # names have no special characters, and the newest is used
  candidate=$(ls -td "$stage_folder"/*/config.json 2>/dev/null | head -n 1)
  echo "${candidate%/config.json}"
}

read -r -a checkpoints <<<"${MODEL_NAME_OR_PATH:-}"
for i in "${!checkpoints[@]}"; do
  [[ ${checkpoints[i]} == *=* ]] || checkpoints[i]=$(basename "${checkpoints[i]}")=${checkpoints[i]}
done
last_only=
if [[ -z ${STAGES_ROOT:-} ]]; then
  STAGES_ROOT=$ROOT_PATH/output/LM last_only=yes
fi
if [[ ${#checkpoints[@]} -eq 0 && -d $STAGES_ROOT ]]; then
  number=0
  for name in stage1 mtp1_stage1 mtp10_stage1 mtp10_stage2; do
    number=$((number + 1))
    folder=$(run_folder "$name")
    if [[ -f $folder/config.json ]]; then
      checkpoints+=("stage$number=$folder")
    else
      [[ -n $last_only ]] || echo "stage $number ($name) has no result under $STAGES_ROOT; skipped" >&2
    fi
  done
  if [[ -n $last_only && ${#checkpoints[@]} -gt 0 ]]; then checkpoints=("${checkpoints[@]: -1}"); fi
fi
[[ ${#checkpoints[@]} -gt 0 ]] || die "nothing to score: set MODEL_NAME_OR_PATH or STAGES_ROOT"

# -- test sets ------------------------------------------------------------------------------------------

sets=()
add_sets() { # FLAG FILES…
  [[ $# -eq 1 ]] || sets+=("$@")
}
for task in asr tts sqa text_qa; do
  variable=${task^^}_JSON
  read -r -a files <<<"${!variable:-}"
  add_sets "--$task" "${files[@]}"
done
read -r -a files <<<"${SEED_TTS_LIST:-}"
add_sets --seed_tts "${files[@]}"

root=$ROOT_PATH
if [[ ${#sets[@]} -eq 0 && -z ${BENCHMARKS:-} ]]; then
  if [[ -n ${CORPUS:-} ]]; then
    root=$CORPUS BENCHMARKS=$REPOSITORY/configs/quickstart/benchmarks.yaml
  else
    [[ -d $ROOT_PATH/data ]] ||
      die "no test set: set BENCHMARKS, CORPUS, or ASR_JSON, TTS_JSON, SQA_JSON, TEXT_QA_JSON or SEED_TTS_LIST; there is no $ROOT_PATH/data"
    BENCHMARKS=paper
  fi
fi
if [[ -n ${BENCHMARKS:-} ]]; then
  read -r -a files <<<"$BENCHMARKS"
  sets+=(--benchmarks "${files[@]}" --root "$root")
fi
DATA_ROOT=${DATA_ROOT:-${CORPUS:-}}

# -- launch ---------------------------------------------------------------------------------------------

options=()
add() { # FLAG VALUE, unless the value is empty
  [[ -z $2 ]] || options+=("$1" "$2")
}
add --audio_tokenizer_path "$AUDIO_TOKENIZER_PATH"
add --flow_path "${FLOW_PATH:-}"
add --frontend_path "${AUDIO_MODEL_NAME_OR_PATH:-}"
add --data_root "$DATA_ROOT"
add --limit "${LIMIT:-}"
add --batch_size "${BATCH_SIZE:-}"
add --max_new_tokens "${MAX_NEW_TOKENS:-}"
add --samples "${SAMPLES:-}"
add --speed_items "${SPEED_ITEMS:-}"
add --system_prompt "${SYSTEM_PROMPT:-}"
add --transcriber "${TRANSCRIBER:-}"
add --transcriber_path "${TRANSCRIBER_PATH:-}"
add --grammar "${GRAMMAR:-}"
add --language "${LANGUAGE_CODE:-}"
add --chinese_transcriber "${CHINESE_TRANSCRIBER:-}"
add --chinese_transcriber_path "${CHINESE_TRANSCRIBER_PATH:-}"
add --speaker_model "${SPEAKER_MODEL:-}"
add --speaker_model_path "${SPEAKER_MODEL_PATH:-}"
add --quality_model "${QUALITY_MODEL:-}"
add --text_normaliser "${TEXT_NORMALISER:-}"
if [[ -n ${DECODING:-} ]]; then
  read -r -a decodings <<<"$DECODING"
  options+=(--decoding "${decodings[@]}")
fi
if [[ -n ${MODES:-} ]]; then
  read -r -a modes <<<"$MODES"
  options+=(--modes "${modes[@]}")
fi

# On GPUs the items are split over one process each; on a CPU one process feeds several recognisers.
# shellcheck source=devices.sh
source "$REPOSITORY/scripts/deepspeed/devices.sh"
gpus=$(count_gpus)
set_rendezvous 34568
EVALUATION_PROCESSES=${EVALUATION_PROCESSES:-$((gpus > 0 ? gpus : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
command=("$REPOSITORY/tools/evaluate_table.py")
if [[ $EVALUATION_PROCESSES -gt 1 || $NNODES -gt 1 ]]; then
  command=(-m torch.distributed.run "${RENDEZVOUS[@]}" --nproc_per_node "$EVALUATION_PROCESSES" "${command[@]}")
fi
exec "${PYTHON:-python}" "${command[@]}" \
  --checkpoints "${checkpoints[@]}" \
  --audio_tokenizer_type "$AUDIO_TOKENIZER_TYPE" \
  --output_dir "$OUTPUT_DIR" \
  "${sets[@]}" "${options[@]}" "$@"
