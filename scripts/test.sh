#!/usr/bin/env bash
# The tests: style, layers, shell scripts, then pytest. Self-contained on a fresh machine.
#   bash scripts/test.sh            everything but the slow tests
#   bash scripts/test.sh --all      the slow ones too, among them the whole chain in small (what CI runs)
#   bash scripts/test.sh -- ARGS    pytest with these arguments only
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"
cd "$REPOSITORY"

all=false
case ${1:-} in
  --all) all=true ;;
  -- | "") ;;
  *) die "unknown option $1; see the head of scripts/test.sh" ;;
esac

prepare_environment dev
PATH=$VENV/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
# The tests' processes are CPU processes wherever they run.
export CUDA_VISIBLE_DEVICES=

if [[ ${1:-} == -- ]]; then
  shift
  exec python -m pytest "$@"
fi

echo "== style"
ruff check .
ruff format --check .
echo "== layers"
lint-imports
echo "== shell scripts"
mapfile -t shell_scripts < <(git ls-files '*.sh' .ci/run)
for script in "${shell_scripts[@]}"; do bash -n "$script"; done
shellcheck "${shell_scripts[@]}"

echo "== tests"
if $all; then
  python -m pytest
  echo "== the whole chain of the Plus variant, in small"
  smoke_folder=$(mktemp -d)
  trap 'rm -rf "$smoke_folder"' EXIT
  bash scripts/quickstart.sh --smoke --variant plus --out "$smoke_folder/plus"
else
  python -m pytest -m "not slow"
fi
