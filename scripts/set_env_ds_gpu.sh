#!/usr/bin/env bash
# Sets up one node of a GPU cluster: pinned packages, FlashAttention, NCCL and DeepSpeed settings.
#   source scripts/set_env_ds_gpu.sh     then run a stage script in the same shell
# Every variable can be set beforehand; existing values are kept.

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$REPOSITORY/.venv}

if [[ ! -x $VENV/bin/python ]]; then
  # In a subshell: environment.sh exits the shell on an error.
  python=$(REPOSITORY=$REPOSITORY bash -c 'source "$REPOSITORY/scripts/environment.sh"; find_python') || return 1
  "$python" -m venv "$VENV" || return 1
fi
# shellcheck disable=SC1091
source "$VENV/bin/activate"

requirements=$REPOSITORY/requirements_ds_gpu.txt
if [[ ! -f $VENV/.cluster || $requirements -nt $VENV/.cluster ]]; then
  # torch first: DeepSpeed and flash-attn look for it while they are built.
  pip install --quiet setuptools wheel ninja packaging "$(grep '^torch==' "$requirements")" || return 1
  grep -v '^flash-attn' "$requirements" >"$VENV/requirements.txt"
  pip install --quiet --no-build-isolation -r "$VENV/requirements.txt" || return 1
  pip install --quiet --no-build-isolation "$(grep "^flash-attn" "$requirements")" ||
    echo "flash-attn could not be built; the stage scripts use sdpa instead" >&2
  pip install --quiet --no-build-isolation --no-deps -e "$REPOSITORY" || return 1
  touch "$VENV/.cluster"
fi

# torchrun's arguments, for scripts that read them. On a cluster that sets NPROC_PER_NODE, WORLD_SIZE and RANK are the
# number of nodes and this node's rank. Otherwise: one node with one process per GPU.
# shellcheck source=deepspeed/devices.sh
source "$REPOSITORY/scripts/deepspeed/devices.sh"
read_nodes
if [[ -z ${NPROC_PER_NODE:-} ]]; then
  NPROC_PER_NODE=$(count_gpus)
  [[ $NPROC_PER_NODE -gt 0 ]] || NPROC_PER_NODE=8
fi
[[ $NNODES != 1 ]] || export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
export NNODES NODE_RANK NPROC_PER_NODE MASTER_PORT=${MASTER_PORT:-34567}

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export NCCL_ASYNC_ERROR_HANDLING=${NCCL_ASYNC_ERROR_HANDLING:-1}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
