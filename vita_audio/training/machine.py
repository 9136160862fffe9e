"""Checks that this machine supports the options, before anything is connected or loaded."""

from __future__ import annotations

import torch

from vita_audio.distributed import local_rank, local_world_size


class MachineError(ValueError):
    """A launch that this machine does not support. The message says what to give instead."""


def check_devices(backend: str | None, use_cpu: bool) -> None:
    """Refuse devices that do not exist.

    Args:
        backend: communication back end, ``--ddp_backend``.
        use_cpu: train on CPUs even if there are GPUs.

    Raises:
        MachineError: NCCL without a GPU, or more processes than GPUs.
    """
    gpus = 0 if use_cpu else torch.cuda.device_count()
    if backend == "nccl" and not gpus:
        raise MachineError(
            "--ddp_backend nccl: this machine has no visible NVIDIA GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES); "
            "to train on CPUs give --use_cpu True --ddp_backend gloo"
        )
    if gpus and local_rank() >= gpus:
        raise MachineError(
            f"{local_world_size()} processes on a machine with {gpus} GPUs; give --nproc_per_node {gpus} or fewer"
        )
