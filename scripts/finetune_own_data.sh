#!/usr/bin/env bash
# Finetunes a model on your own recordings with LoRA, merges the result, and lets it speak a sentence.
#
#   python tools/prepare_data.py folder RECORDINGS --root . --name own --tasks asr tts --test_every 6
#   bash scripts/finetune_own_data.sh own/asr.jsonl own/tts.jsonl --model MODEL [options]
#
#   --model DIR        a released checkpoint, or the result of stage 4
#   --codec DIR        its codec (default: the one that the model's run.json names)
#   --codec_type KIND  (default: as in run.json, else glm4voice, or sensevoice_glm4voice for Plus)
#   --flow DIR         GLM-4-Voice's decoder, to speak the sentence (default: models/THUDM/glm-4-voice-decoder)
#   --old_data FILES   JSON lines of other tasks, in one word; they keep the model from forgetting: half as many
#                      samples of them as of yours
#   --out DIR          (default: output/own_data)
#   --epochs N         passes over your data (default: 5); --steps N sets the steps themselves
#   --rank N, --rate R of the adapters (default: 16, 2e-4)
#   --seq_length N     tokens in a row (default: 2048)
#   --say TEXT         the sentence (default: the first that your voice reads aloud)
#
# Every variable of the stage scripts can be set as well (docs/training.md). The same command continues a run that was
# stopped. The result is OUT/model, an ordinary checkpoint; docs/own_voice.md shows how to score and serve it.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  echo "error: $*" >&2
  exit 2
}
usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

data=()
model=${MODEL_NAME_OR_PATH:-}
codec=${AUDIO_TOKENIZER_PATH:-}
codec_type=${AUDIO_TOKENIZER_TYPE:-}
flow=${FLOW_PATH:-}
old_data=
out=$REPOSITORY/output/own_data
rank=16
seq_length=2048
plan=()
while [[ $# -gt 0 ]]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --*) [[ $# -gt 1 ]] || die "$1 needs a value" ;;&
    --model) model=$2; shift 2 ;;
    --codec) codec=$2; shift 2 ;;
    --codec_type) codec_type=$2; shift 2 ;;
    --flow) flow=$2; shift 2 ;;
    --old_data) old_data=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --rank) rank=$2; shift 2 ;;
    --rate) LEARNING_RATE=$2; shift 2 ;;
    --seq_length) seq_length=$2; shift 2 ;;
    --epochs | --steps | --say) plan+=("$1" "$2"); shift 2 ;;
    --*) die "unknown option $1; see bash scripts/finetune_own_data.sh --help" ;;
    *) data+=("$1"); shift ;;
  esac
done
[[ ${#data[@]} -gt 0 ]] || die "no data: give JSON lines of tools/prepare_data.py folder; see --help"
[[ -n $model ]] || die "no model: give --model, a released checkpoint or the result of stage 4"
mkdir -p "$out" 2>/dev/null || die "--out $out: cannot be created; choose another folder"
out=$(cd "$out" && pwd)

export PYTHON=${PYTHON:-python} TOKENIZERS_PARALLELISM=false
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
if [[ -z $flow && -d ${ROOT_PATH:-$REPOSITORY}/models/THUDM/glm-4-voice-decoder ]]; then
  flow=${ROOT_PATH:-$REPOSITORY}/models/THUDM/glm-4-voice-decoder
fi
# shellcheck source=deepspeed/devices.sh
source "$REPOSITORY/scripts/deepspeed/devices.sh"
gpus=$(count_gpus)
export NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
export GRADIENT_ACCUMULATION_STEPS=${GRADIENT_ACCUMULATION_STEPS:-1}
read -r -a old_files <<<"$old_data"

export DATA_ROOT=${DATA_ROOT:-${ROOT_PATH:-$PWD}}
settings=$("$PYTHON" -m vita_audio.cli.own_voice "${data[@]}" --model "$model" --codec "$codec" \
  --codec_type "$codec_type" --old_data "${old_files[@]}" --data_root "$DATA_ROOT" --out "$out" \
  --seq_length "$seq_length" --rows_per_step $((NPROC_PER_NODE * GRADIENT_ACCUMULATION_STEPS)) "${plan[@]}")
# shellcheck disable=SC2034  # read by the stage script
set -a
eval "$settings"
LEARNING_RATE=${LEARNING_RATE:-2e-4}
MTP_LEARNING_RATE_MULTIPLIER=${MTP_LEARNING_RATE_MULTIPLIER:-1}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
DATALOADER_NUM_WORKERS=${DATALOADER_NUM_WORKERS:-$((gpus > 0 ? 4 : 0))}
export OUTPUT_DIR=$out/adapters
set +a

# -- train ----------------------------------------------------------------------------------------------

if [[ ! -f $out/model/config.json ]]; then
  bash "$REPOSITORY/scripts/deepspeed/sts_qwen25/$STAGE_SCRIPT" "$seq_length" own --lora_r "$rank"
  rm -rf "$out/model.part"
  "$PYTHON" "$REPOSITORY/tools/merge_lora.py" "$out/adapters" --output_dir "$out/model.part"
  mv "$out/model.part" "$out/model"
else
  echo "$out/model is there already; delete $out to train again"
fi

# -- listen ---------------------------------------------------------------------------------------------

flags=(--model_name_or_path "$out/model" --audio_tokenizer_type "$AUDIO_TOKENIZER_TYPE")
flags+=(--audio_tokenizer_path "$AUDIO_TOKENIZER_PATH")
[[ -z ${AUDIO_MODEL_NAME_OR_PATH:-} ]] || flags+=(--frontend_path "$AUDIO_MODEL_NAME_OR_PATH")
[[ -z $flow || $AUDIO_TOKENIZER_TYPE != *glm4voice ]] || flags+=(--flow_path "$flow")
"$PYTHON" "$REPOSITORY/tools/inference_sts.py" "${flags[@]}" --tts "$SAY" --no_stream \
  --output_dir "$out/spoken" >/dev/null
shown=$(printf '%q ' "${flags[@]}")
wav=$(find "$out/spoken" -name '*.wav' | sort | head -n 1)
cat <<END
"$SAY" is spoken in $wav
listen to it:      ffplay -nodisp -autoexit "$wav"   (or aplay, afplay, or any player)
another sentence:  python tools/inference_sts.py $shown--tts "…" --output_dir "$out/spoken"
a page to talk to: bash scripts/serve.sh $shown
END
