"""What a machine supports, and the speed that an MFU refers to."""

import pytest
import torch

from vita_audio.training.machine import MachineError, check_devices, matrix_speed, peak_flops


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_devices("nccl", use_cpu=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MachineError, match="3 processes on a machine with 2 GPUs; give --nproc_per_node 2"):
        check_devices("nccl", use_cpu=False)
    check_devices("gloo", use_cpu=True)


def test_nccl_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MachineError, match="--ddp_backend nccl: this machine has no visible NVIDIA GPU"):
        check_devices("nccl", use_cpu=False)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12)]
)
def test_the_mfu_of_a_known_gpu_refers_to_its_data_sheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == peak
    peak_flops.cache_clear()


def test_the_mfu_elsewhere_refers_to_a_measured_product():
    cpu = torch.device("cpu")
    assert peak_flops(cpu, torch.float32) > 1e8
    assert matrix_speed(cpu, torch.float32, size=64) > 1e6
