#!/usr/bin/env bash
# Convert a checkpoint so that another number of processes can go on from it.
#   bash convert_checkpoint.sh OUTPUT_DIR/checkpoint-N
# DeepSpeed's checkpoints hold one part for each process that wrote them. This adds the same state in DeepSpeed's
# universal format, whole, beside them; a run with another number of processes reads that. It needs the memory of
# one process and as much disk again.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $(basename "$0") OUTPUT_DIR/checkpoint-N" >&2
  exit 2
fi
CHECKPOINT=${1%/}
PYTHON=${PYTHON:-python}
if [[ ! -f $CHECKPOINT/checkpoint.complete || ! -f $CHECKPOINT/latest ]]; then
  echo "$CHECKPOINT: not a whole checkpoint of a DeepSpeed run; give OUTPUT_DIR/checkpoint-N" >&2
  exit 2
fi
TAG=$(<"$CHECKPOINT/latest")
UNIVERSAL=$CHECKPOINT/${TAG}_universal
rm -rf "$UNIVERSAL" "$CHECKPOINT/latest_universal" # of a conversion that was stopped

DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} "$PYTHON" -m deepspeed.checkpoint.ds_to_universal \
  --input_folder "$CHECKPOINT/$TAG" --output_folder "$UNIVERSAL" \
  --num_extract_workers "${WORKERS:-1}" --num_merge_workers "${WORKERS:-1}" --inject_missing_state
echo "$CHECKPOINT can be continued with any number of processes"
