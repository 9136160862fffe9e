#!/usr/bin/env bash
# Sourced by the stage scripts and evaluate_sts.sh.

# How many NVIDIA GPUs this shell may use: those in CUDA_VISIBLE_DEVICES, else all.
count_gpus() {
  local all visible
  all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
  if [[ -z ${CUDA_VISIBLE_DEVICES+set} || $all -eq 0 ]]; then
    echo "$all"
    return
  fi
  IFS=, read -r -a visible <<<"$CUDA_VISIBLE_DEVICES"
  # -1 and whatever stands behind it are invisible.
  local count=0 device
  for device in "${visible[@]}"; do
    [[ $device != -1 ]] || break
    count=$((count + 1))
  done
  echo "$count"
}
