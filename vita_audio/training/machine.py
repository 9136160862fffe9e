"""This machine: whether it supports the options, and how fast it multiplies matrices."""

from __future__ import annotations

import time
from functools import lru_cache

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


PEAKS = {"H20": 148e12, "A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 operations a second of GPUs by a word of their name, from the vendor's sheets."""


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that an MFU refers to: the vendor's figure of a known GPU, else the measured speed."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        known = [peak for name, peak in PEAKS.items() if name in words]
        if known:
            return known[0]
    return matrix_speed(device, dtype, size=4096 if device.type == "cuda" else 768)


def matrix_speed(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of a product of two square matrices, the best of five."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
