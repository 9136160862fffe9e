#!/usr/bin/env bash
# Sourced by quickstart.sh, the stage scripts and evaluate_sts.sh.

# The number of NVIDIA GPUs that this shell may use: those in CUDA_VISIBLE_DEVICES, else all.
count_gpus() {
  local all visible
  all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} || $all -eq 0 ]]; then
    echo "$all"
    return
  fi
  IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
  # -1 and all entries after it are invisible.
  local count=0 device
  for device in "${visible[@]}"; do
    [[ $device != -1 ]] || break
    count=$((count + 1))
  done
  echo "$count"
}

# NNODES and NODE_RANK: as set, else from a cluster that sets NPROC_PER_NODE and uses WORLD_SIZE and RANK for nodes,
# else one node.
read_nodes() {
  if [[ -n ${NPROC_PER_NODE:-} ]]; then
    NNODES=${NNODES:-${WORLD_SIZE:-}}
    NODE_RANK=${NODE_RANK:-${RANK:-}}
  fi
  NNODES=${NNODES:-1}
  NODE_RANK=${NODE_RANK:-0}
}

# Sets RENDEZVOUS to torchrun's flags for NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT. A single node without
# a port uses a free one.
# shellcheck disable=SC2034  # used by the scripts that source this file
set_rendezvous() { # DEFAULT_PORT
  read_nodes
  if ! [[ $NNODES =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NNODES=$NNODES: give the number of nodes, 1 or more" >&2
    exit 1
  fi
  if [[ $NNODES -eq 1 && -z ${MASTER_PORT:-} ]]; then
    RENDEZVOUS=(--standalone)
    return
  fi
  if [[ $NNODES -gt 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "error: NNODES=$NNODES without MASTER_ADDR; set it on every node to the address of node 0" >&2
    exit 1
  fi
  RENDEZVOUS=(
    --nnodes "$NNODES" --node_rank "$NODE_RANK"
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-$1}"
  )
}
