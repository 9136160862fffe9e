#!/usr/bin/env bash
# The whole system on one machine, without a GPU or downloaded weights:
# it generates a spoken corpus, runs four DeepSpeed stages with the cluster's scripts, lets the model
# answer aloud, scores it with an independent recogniser, and shows the result on a page.
#
#   bash scripts/quickstart.sh [--out DIR] [--minutes N] [--smoke] [--variant base|plus]
#
#   --out DIR        output folder of the run (default: quickstart/ in the repository)
#   --minutes N      scales the training steps; the default 25 gives those of configs/quickstart/*.env
#   --smoke          the same chain with a few steps each, in minutes; its scores are meaningless
#   --variant plus   user speech enters through SenseVoice features and an adapter
#
# Finished steps are skipped; an interrupted step continues. Delete DIR to start again.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# A shell may hold variables from manual training or scoring. The script restarts itself in an environment with
# only these: machine settings, and the locations of Python and its caches.
PASSED_ON=(
  PATH HOME USER LOGNAME SHELL TMPDIR TERM LANG LC_ALL LC_CTYPE TZ
  VENV PYTHON_BOOTSTRAP CUDA_VISIBLE_DEVICES CUDA_HOME LD_LIBRARY_PATH DS_ACCELERATOR OMP_NUM_THREADS
  OPENBLAS_CORETYPE OPENBLAS_L2_SIZE # another kernel rounds differently, so the codec would differ
  HF_HOME HF_DATASETS_CACHE XDG_CACHE_HOME PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE PIP_CERT PIP_CACHE_DIR
  http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE
)
if [[ ${QUICKSTART_ENVIRONMENT:-} != clean ]]; then
  kept=(QUICKSTART_ENVIRONMENT=clean)
  for name in "${PASSED_ON[@]}"; do
    [[ -z ${!name+set} ]] || kept+=("$name=${!name}")
  done
  exec env -i "${kept[@]}" "$BASH" "${BASH_SOURCE[0]}" "$@"
fi

source "$REPOSITORY/scripts/environment.sh"

usage() { sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

out=
minutes=25
variant=base
size=full
while [[ $# -gt 0 ]]; do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    --minutes) minutes=${2:?--minutes needs a number}; shift 2 ;;
    --variant) variant=${2:?--variant needs base or plus}; shift 2 ;;
    --smoke) size=smoke; shift ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $1; see bash scripts/quickstart.sh --help" ;;
  esac
done

# -- check the arguments ---------------------------------------------------------------------------------

[[ $minutes =~ ^[1-9][0-9]*$ ]] || die "--minutes $minutes: give a whole number, 1 or more"
[[ $variant == base || $variant == plus ]] || die "--variant $variant: give base or plus"
kind=$variant-$size
case $kind in
  base-full) out=${out:-$REPOSITORY/quickstart} ;;
  *) out=${out:-$REPOSITORY/quickstart-$kind} ;;
esac
[[ $minutes == 25 ]] || kind+="-$minutes-minute"
find_python >/dev/null || exit 1
if ! { mkdir -p "$out" 2>/dev/null && [[ -w $out ]]; }; then
  die "--out $out: cannot write there; choose another folder"
fi
out=$(cd "$out" && pwd)

if [[ -f $out/.kind && $(<"$out/.kind") != "$kind" ]]; then
  die "--out $out: holds a $(<"$out/.kind") run, this is a $kind one; choose another folder"
fi

require_space() { # FOLDER MEGABYTES WHAT
  local free
  free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
  [[ $free -ge $2 ]] || die "$1: $free MB free, but $3 needs $2 MB; free some or choose another folder"
}
require_space "$out" 1500 "the run"
if [[ ! -d $VENV ]]; then
  mkdir -p "$(dirname "$VENV")" 2>/dev/null || die "VENV=$VENV: cannot write there; choose another folder"
  # With a GPU, torch includes CUDA's libraries.
  require_space "$(dirname "$VENV")" "$(has_nvidia_gpu && echo 12000 || echo 4000)" "the installation"
fi

# -- steps ----------------------------------------------------------------------------------------------

mkdir -p "$out/.done" "$out/logs"
started=$SECONDS
exec 9>"$out/.lock"
echo "$kind" >"$out/.kind"
flock --nonblock 9 || die "another quickstart is running in $out; wait for it or choose another folder"

# Steps are killed when this script dies, even by SIGKILL.
tied=()
if command -v setpriv >/dev/null 2>&1; then tied=(setpriv --pdeathsig TERM --); fi

step() { # NAME COMMAND…
  local name=$1 from=$SECONDS
  shift
  if [[ -f $out/.done/$name ]]; then
    echo "[$name] done before, in $(<"$out/.done/$name") s"
    return
  fi
  echo "[$name]"
  if ! "${tied[@]}" "$@" 2>&1 9>&- | tee -a "$out/logs/$name.log" 9>&-; then
    die "step $name failed; its log is $out/logs/$name.log. Run the same command again to continue"
  fi
  echo $((SECONDS - from)) >"$out/.done/$name"
  echo "[$name] took $((SECONDS - from)) s"
}

prepare_environment quickstart
PATH=$VENV/bin:$PATH
export PYTHON=$VENV/bin/python PYTHONPATH=$REPOSITORY TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Sizes, steps and rates: configuration only. The later file wins.
QUICKSTART_CONFIG=$REPOSITORY/configs/quickstart
set -a
for settings in "$size" "$variant" "$variant-$size"; do
  # shellcheck source=/dev/null
  [[ ! -f $QUICKSTART_CONFIG/$settings.env ]] || source "$QUICKSTART_CONFIG/$settings.env"
done
set +a

# Two rows per step, with two processes or one GPU.
# shellcheck source=deepspeed/devices.sh
source "$REPOSITORY/scripts/deepspeed/devices.sh"
export NPROC_PER_NODE=2 GRADIENT_ACCUMULATION_STEPS=1
if [[ $(count_gpus) -eq 1 ]]; then NPROC_PER_NODE=1 GRADIENT_ACCUMULATION_STEPS=2; fi

scaled() { # STEPS, in proportion to --minutes
  local steps=$(($1 * minutes / 25))
  echo $((steps > 2 ? steps : 2))
}

makers=$REPOSITORY/tools/quickstart
corpus=$out/corpus
codec=$out/codec
base=$out/base
stages=$out/stages
token_cache=$out/audio_tokens

python "$makers/espeak.py" || exit 1
step corpus python "$makers/make_spoken_arithmetic.py" --out "$corpus" --utterances "$UTTERANCES"
step codec python "$makers/fit_mel_vq.py" --corpus "$corpus" --out "$codec" \
  --max_clips "$CODEC_CLIPS"
step base_llm python "$makers/make_base_llm.py" \
  --corpus "$corpus" --config "$QUICKSTART_CONFIG/$BASE_LLM_CONFIG" --out "$base"
if [[ $variant == plus ]]; then
  step sensevoice python "$makers/make_sensevoice.py" --corpus "$corpus" --out "$out/sensevoice"
  export AUDIO_MODEL_NAME_OR_PATH=$out/sensevoice
fi

export DATA_ROOT=$corpus OUTPUT_ROOT=$stages AUDIO_TOKENIZER_PATH=$codec
export AUDIO_TOKEN_CACHE=$token_cache
step audio_tokens "$PYTHON" "$REPOSITORY/vita_audio/cli/launch.py" --standalone --nproc_per_node 2 \
  "$REPOSITORY/tools/tokenize_audio.py" --audio_tokenizer_type "$DISCRETE_TOKENIZER_TYPE" \
  --audio_tokenizer_path "$codec" --dataset_name "$QUICKSTART_CONFIG/mix_stage1.yaml" \
  --data_root "$corpus" --output_dir "$token_cache"

stage() { # NAME MIX STEPS RATE SEQ_LENGTH DEEPSPEED_CONFIG
  DATASET_NAME=$QUICKSTART_CONFIG/$2 MAX_STEPS=$(scaled "$3") LEARNING_RATE=$4 DEEPSPEED_CONFIG=$6 \
    step "$1" bash "$REPOSITORY/scripts/deepspeed/sts_qwen25/finetune_${STAGE_PREFIX}_$1.sh" "$5" quickstart
}
zero2=$QUICKSTART_CONFIG/ds_config_zero2.json
zero2_no_optimizer=$QUICKSTART_CONFIG/ds_config_zero2_no_optimizer.json
MODEL_NAME_OR_PATH=$base AUDIO_MODEL_FREEZE=${STAGE1_AUDIO_MODEL_FREEZE:-True} \
  stage stage1 mix_stage1.yaml "$STAGE1_STEPS" "$STAGE1_RATE" "$SEQ_LENGTH" "$zero2"
stage mtp1_stage1 mix_stage1.yaml "$STAGE2_STEPS" "$STAGE2_RATE" "$SEQ_LENGTH" "$zero2"
stage mtp10_stage1 mix_stage1.yaml "$STAGE3_STEPS" "$STAGE3_RATE" "$SEQ_LENGTH" "$zero2"
MTP_LEARNING_RATE_MULTIPLIER=$STAGE4_HEAD_MULTIPLIER \
  stage mtp10_stage2 mix_stage2.yaml "$STAGE4_STEPS" "$STAGE4_RATE" "$STAGE4_SEQ_LENGTH" "$zero2_no_optimizer"

# -- talk, score, show ----------------------------------------------------------------------------------

result=$stages/finetune_${STAGE_PREFIX}_mtp10_stage2/quickstart
step inference python "$REPOSITORY/tools/inference_sts.py" \
  --model_name_or_path "$result" --audio_tokenizer_type "$AUDIO_TOKENIZER_TYPE" \
  --audio_tokenizer_path "$codec" ${AUDIO_MODEL_NAME_OR_PATH:+--frontend_path "$AUDIO_MODEL_NAME_OR_PATH"} \
  --samples "$corpus/examples.jsonl" --all_modes --max_new_tokens "$MAX_NEW_TOKENS" --output_dir "$out/inference"
step evaluation env STAGES_ROOT="$stages" STAGE_PREFIX="$STAGE_PREFIX" TIMESTAMP=quickstart CORPUS="$corpus" \
  OUTPUT_DIR="$out/evaluation" LIMIT="$EVALUATION_LIMIT" \
  bash "$REPOSITORY/scripts/deepspeed/evaluate_sts.sh"
step analysis python "$REPOSITORY/tools/analyse_attention.py" \
  --model_name_or_path "$result" --audio_tokenizer_type "$AUDIO_TOKENIZER_TYPE" --audio_tokenizer_path "$codec" \
  ${AUDIO_MODEL_NAME_OR_PATH:+--frontend_path "$AUDIO_MODEL_NAME_OR_PATH"} --json_path "$corpus/tts_test.jsonl" \
  --data_root "$corpus" --grammar "$corpus/grammar.jsgf" --system_prompt "$SYSTEM_PROMPT" \
  --limit "$ANALYSIS_LIMIT" --max_new_tokens "$MAX_NEW_TOKENS" --output_dir "$out/analysis"
step report python "$REPOSITORY/tools/report.py" --run "$out"

echo "finished in $((SECONDS - started)) s; open $out/report.html"
cat "$out/evaluation/results.md"

# -- what to do next ------------------------------------------------------------------------------------

quoted() { printf '%q' "$1"; }
flags="--model_name_or_path $(quoted "$result") --audio_tokenizer_type $AUDIO_TOKENIZER_TYPE"
flags+=" --audio_tokenizer_path $(quoted "$codec")"
frontend=
if [[ $variant == plus ]]; then
  flags+=" --frontend_path $(quoted "$AUDIO_MODEL_NAME_OR_PATH")"
  frontend=", frontend_path=\"$AUDIO_MODEL_NAME_OR_PATH\""
fi
cat <<END

The model is in $result
and its codec in $codec. Talk to it from the shell:

source $(quoted "$VENV")/bin/activate
python $(quoted "$REPOSITORY")/tools/inference_sts.py $flags \\
  --question $(quoted "$corpus/question.wav") --tts "four seven one" --output_dir $(quoted "$out/talk")

or from Python, in the same environment:

python - <<'PY'
from vita_audio.audio import save_audio
from vita_audio.inference import SpeechPipeline

pipeline = SpeechPipeline.from_pretrained("$result", "$AUDIO_TOKENIZER_TYPE", "$codec"$frontend)
reply = pipeline.speech_to_speech("$corpus/question.wav")
print(reply.text)
save_audio("$out/reply.wav", reply.waveform, reply.sample_rate)
PY

Your own voice or task: docs/your_own_data.md.
END
