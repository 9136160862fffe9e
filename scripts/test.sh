#!/usr/bin/env bash
# The checks that every change must pass: style, layers, types, shell scripts, documentation, then pytest. It also
# sets up a fresh machine.
#   bash scripts/test.sh            everything but the slow tests
#   bash scripts/test.sh --all      also the slow tests and line coverage (as in CI)
#   bash scripts/test.sh -- ARGS    only pytest, with these arguments, in one process
# TEST_PROCESSES: processes that share the test files, 2 by default.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"
cd "$REPOSITORY"
LEAST_COVERAGE=80 # percent of the lines of each file of vita_audio/

all=false
case ${1:-} in
  --all) all=true ;;
  -- | "") ;;
  *) die "unknown option $1; see the head of scripts/test.sh" ;;
esac

prepare_environment dev
PATH=$VENV/bin:$PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu

processes=(-n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder)

if [[ ${1:-} == -- ]]; then
  shift
  exec python -m pytest "$@"
fi

echo "== style"
ruff check .
ruff format --check .
echo "== layers"
lint-imports
echo "== types"
mypy
echo "== shell scripts"
mapfile -t shell_scripts < <(git ls-files '*.sh' .ci/run)
for script in "${shell_scripts[@]}"; do bash -n "$script"; done
shellcheck "${shell_scripts[@]}"
echo "== documentation"
NO_MKDOCS_2_WARNING=1 mkdocs build --strict # with --quiet it would not fail

echo "== tests"
if ! $all; then
  exec python -m pytest "${processes[@]}" -m "not slow"
fi
rm -rf build/coverage && mkdir -p build/coverage
coverage run -m pytest "${processes[@]}" --durations=25
echo "== line coverage, at least $LEAST_COVERAGE% of each file"
coverage combine --quiet
coverage report | tee build/coverage/report.txt
untested=$(awk -v least="$LEAST_COVERAGE" '/^vita_audio/ && $NF + 0 < least { print $1 }' build/coverage/report.txt)
[[ -z $untested ]] || die "less than $LEAST_COVERAGE% of the lines covered: ${untested//$'\n'/, }; add tests"
