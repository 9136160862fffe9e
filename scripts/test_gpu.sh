#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests marked gpu (ten minutes at most), then the benchmarks at 7B shapes.
#   bash scripts/test_gpu.sh [FOLDER]   FOLDER (default: build/gpu) receives gpu.json: card, versions, all figures
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"
folder=$(realpath -m "${1:-$REPOSITORY/build/gpu}")
cd "$REPOSITORY"
prepare_environment dev
PATH=$VENV/bin:$PATH
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die "no CUDA device; scripts/test.sh runs the tests of the CPU"
exec python tools/benchmark.py gpu --out "$folder"
