#!/usr/bin/env bash
# Converts a checkpoint, so another number of processes can continue from it.
#   bash convert_checkpoint.sh OUTPUT_DIR/checkpoint-N
# DeepSpeed's checkpoints have one part per process. This adds the same state in DeepSpeed's universal format,
# which a run with another number of processes reads. It needs the memory of one process and doubles the disk
# space.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $(basename "$0") OUTPUT_DIR/checkpoint-N" >&2
  exit 2
fi
CHECKPOINT=${1%/}
PYTHON=${PYTHON:-python}
if [[ ! -f $CHECKPOINT/checkpoint.complete || ! -f $CHECKPOINT/latest ]]; then
  echo "$CHECKPOINT: not a complete checkpoint of a DeepSpeed run; give OUTPUT_DIR/checkpoint-N" >&2
  exit 2
fi
# DeepSpeed's conversion would return the weights of such a run in another order.
if "$PYTHON" - "$CHECKPOINT/run.json" <<'PYTHON_END'
import json, sys
config = json.load(open(sys.argv[1], encoding="utf-8"))["arguments"].get("deepspeed") or {}
sys.exit(not (isinstance(config, dict) and config.get("zero_optimization", {}).get("round_robin_gradients")))
PYTHON_END
then
  echo "$CHECKPOINT: written with round_robin_gradients, which DeepSpeed cannot convert; continue with as many processes" >&2
  exit 2
fi
TAG=$(<"$CHECKPOINT/latest")
UNIVERSAL=$CHECKPOINT/${TAG}_universal
rm -rf "$UNIVERSAL" "$CHECKPOINT/latest_universal" # left by an interrupted conversion

DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} "$PYTHON" -m deepspeed.checkpoint.ds_to_universal \
  --input_folder "$CHECKPOINT/$TAG" --output_folder "$UNIVERSAL" \
  --num_extract_workers "${WORKERS:-1}" --num_merge_workers "${WORKERS:-1}" --inject_missing_state
echo "$CHECKPOINT can be continued with any number of processes"
