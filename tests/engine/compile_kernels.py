"""Compiles the GPU's kernels for several generations, which needs Triton but no GPU; test_triton_kernels.py runs it.

Triton makes a kernel anew for integers that are 1 or multiples of 16, so each is called with several sizes. Calls go
through the functions of the module, on tensors of the CPU, and end before the launch.
"""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from vita_audio.engine import triton_kernels

compiled = 0


class NoGpu:
    """What Triton asks its driver before it compiles."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}"  # kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_only(run):
    def warm_up(self, *args, grid, warmup, **options):
        global compiled
        compiled += run(self, *args, grid=grid, warmup=True, **options) is not None

    return warm_up


CASES = [  # rows, key heads, queries of each, width, length, size of a head
    (1, 1, 1, 1, 200, 16),
    (1, 2, 7, 11, 600, 64),
    (3, 4, 7, 1, 600, 128),
    (8, 4, 7, 11, 200, 128),
]


def call_all(dtype: torch.dtype) -> None:
    for rows, kv, groups, width, length, size in CASES:
        queries = kv * groups
        cache = torch.zeros(2, rows, kv, length + 1, size, dtype=dtype)
        qkv = torch.zeros(rows * width, queries + 2 * kv, size, dtype=dtype)
        places = torch.zeros(rows * width * 2 * kv, dtype=torch.long)
        query = triton_kernels.rotate(qkv, qkv, qkv, cache, places, queries)
        positions = torch.zeros(rows, width, dtype=torch.long)
        for reach in (None, 128):
            triton_kernels.attend(query, cache, positions, 0, length, reach)
    for rows, size, outputs in ((1, 1, 1), (11, 100, 200), (1, 896, 1152), (88, 896, 20_000)):
        x = torch.zeros(rows, size, dtype=dtype)
        triton_kernels.rms_norm(x, x[0], 1e-6)
        triton_kernels.gate(torch.zeros(rows, 2 * size, dtype=dtype))
        weight = torch.ones(outputs, size, dtype=dtype)
        triton_kernels.Int8WeightProduct([weight], [weight[:, 0]])(x)
        triton_kernels.Int8WeightProduct([weight])(x, add=torch.zeros(rows, outputs, dtype=dtype))


def main() -> None:
    stand_in = NoGpu()
    driver.set_active(stand_in)
    jit.JITFunction.run = compile_only(jit.JITFunction.run)
    for generation in (80, 90, 120):
        stand_in.target = GPUTarget("cuda", generation, 32)
        for dtype in (torch.bfloat16, torch.float32):
            call_all(dtype)
    print(f"{compiled} calls of {triton.__version__}'s kernels compile")


if __name__ == "__main__":
    main()
