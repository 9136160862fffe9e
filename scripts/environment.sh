#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: creates the virtual environment and installs the package. Needs REPOSITORY.
#   prepare_environment EXTRA      an extra of setup.py: "quickstart" or "dev"
# VENV names the folder (default .venv in the repository); PYTHON_BOOTSTRAP the interpreter.
VENV=${VENV:-$REPOSITORY/.venv}

# The tested versions: newer releases have changed behaviour before.
PINNED=$REPOSITORY/constraints-cpu.txt
TORCH_VERSION=$(sed -n 's/^torch==//p' "$PINNED")

die() {
  echo "error: $*" >&2
  exit 1
}

find_python() { # the path of a suitable Python, or one line on stderr
  local candidate
  for candidate in "${PYTHON_BOOTSTRAP:-}" python3 python3.13 python3.12 python3.11 python; do
    if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "error: Python 3.11 to 3.13 is needed and none was found; install one or set PYTHON_BOOTSTRAP" >&2
  return 1
}

has_nvidia_gpu() {
  [[ $(nvidia-smi -L 2>/dev/null) == "GPU "* ]]
}

install_torch() {
  if has_nvidia_gpu; then
    pip_install "torch==$TORCH_VERSION"
  elif ! pip_install "torch==$TORCH_VERSION+cpu" 2>/dev/null; then
    # PyTorch publishes its CPU builds on a separate index.
    pip_install "torch==$TORCH_VERSION+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  fi
}

pip_install() {
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$PINNED" "$@"
}

prepare_environment() {
  local extra=$1 python stamp wanted
  python=$(find_python) || exit 1
  wanted=$(cat "$REPOSITORY/setup.py" "$REPOSITORY/scripts/environment.sh" "$PINNED" | cksum)
  for stamp in "$VENV/.installed-dev" "$VENV/.installed-$extra"; do # dev includes everything
    if [[ -x $VENV/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
      return 0
    fi
  done
  echo "installing into $VENV (a few minutes the first time)"
  if [[ ! -x $VENV/bin/python ]]; then
    "$python" -m venv "$VENV" || die "cannot make a virtual environment in $VENV; on Debian install python3-venv"
  fi
  # pip is missing if creation was interrupted or python3-venv was not installed.
  if ! { "$VENV/bin/python" -m pip --version || "$VENV/bin/python" -m ensurepip; } >/dev/null 2>&1; then
    die "$VENV has no pip; on Debian install python3-venv. If that does not help, delete the folder"
  fi
  local from=$SECONDS
  echo "  torch $TORCH_VERSION (1 of 3)"
  install_torch || die "cannot install torch $TORCH_VERSION; see pip's message above"
  echo "  DeepSpeed (2 of 3)"
  # DeepSpeed finds torch at install time and compiles nothing in advance.
  if ! { pip_install setuptools wheel ninja && DS_BUILD_OPS=0 pip_install --no-build-isolation deepspeed; }; then
    die "cannot install DeepSpeed; see pip's message above"
  fi
  echo "  the package and its other dependencies (3 of 3)"
  pip_install --no-build-isolation -e "${REPOSITORY}[$extra]" || die "cannot install the package; see pip's message above"
  echo "$wanted" >"$VENV/.installed-$extra"
  echo "installing took $((SECONDS - from)) s"
}
