#!/usr/bin/env bash
# Writes constraints-cpu.txt: the newest versions of everything in setup.py's dev extra, including transitive
# packages, for Python 3.11 to 3.13. Direct dependencies keep the versions of requirements_ds_gpu.txt.
#   bash scripts/renew_constraints.sh            to raise a direct dependency, edit requirements_ds_gpu.txt first
# Only uv, which resolves for several Pythons at once, is installed, in a temporary folder.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$REPOSITORY/scripts/environment.sh"
cd "$REPOSITORY"

python=$(find_python) || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv" || die "cannot make a virtual environment; on Debian install python3-venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv || die "cannot install uv; see pip's message above"

# The build tools that environment.sh installs come from standard input.
printf '%s\n' setuptools wheel ninja |
  "$work/venv/bin/uv" pip compile setup.py - --extra dev --constraint requirements_ds_gpu.txt \
    --universal --python-version 3.11 --no-header --no-annotate --quiet --output-file "$work/resolved.txt" ||
  die "the versions cannot be resolved; see uv's message above"

{
  echo "# The CPU environment, transitive packages included, for Python 3.11 to 3.13."
  echo "# Written by scripts/renew_constraints.sh; do not edit."
  # torch pins CUDA's libraries itself, and needs them only in its CUDA build.
  grep -Ev "^(nvidia-|cuda-)|sys_platform == 'emscripten'|sys_platform == 'win32'" "$work/resolved.txt"
} >"$work/constraints-cpu.txt"
mv "$work/constraints-cpu.txt" constraints-cpu.txt
git --no-pager diff --stat -- constraints-cpu.txt
