#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests in tests/gpu, then the decoding benchmark at 7B shapes.
#   bash scripts/test_gpu.sh [FOLDER]   FOLDER (default: build/gpu) receives decode-7b.json and decode-7b.png
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"
cd "$REPOSITORY"
folder=${1:-build/gpu}
prepare_environment dev
PATH=$VENV/bin:$PATH
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die "no CUDA device; scripts/test.sh runs the tests of the CPU"
mkdir -p "$folder"
python -m pytest tests/gpu
python tools/benchmark.py decode --sizes 7b --tokens 264 --rows 1 4 8 \
  --json "$folder/decode-7b.json" --png "$folder/decode-7b.png"
