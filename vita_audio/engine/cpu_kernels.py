"""Kernels in C++ for CPUs: products with weights in bfloat16 or float32, and whole passes in one call.

PyTorch's operations take some 20 µs each beside the reading of weights, ten of them a layer. ``cpu_kernels.h`` runs
all layers in one parallel region instead. It is compiled when it is first used, which takes some ten seconds, and
kept in ``$XDG_CACHE_HOME/vita_audio`` (``~/.cache/vita_audio``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import math
import mmap
import os
import shlex
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vita_audio.engine.kernels import Norm, joined

if TYPE_CHECKING:
    from vita_audio.engine.state import Window
    from vita_audio.engine.weights import Head, Layer

SOURCE = Path(__file__).with_suffix(".cpp")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))
NAME = "vita_audio_cpu_kernels"
HUGE_PAGE = 1 << 21
LARGE = 4 * HUGE_PAGE
"""Bytes from which a weight gets such pages; of the last one, a part is lost."""
OUTPUTS, KEYS = 32, 64
"""Outputs of a block of weights and positions of a block of a cache, as in the source."""

_logger = logging.getLogger(__name__)


def instructions() -> list[str]:
    """The compiler's flags for the instructions that this CPU has. Not ``-march=native``: a folder of compiled files
    may be shared by machines."""
    if torch.cpu._is_avx512_supported():
        flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
        return [*flags, "-mavx512bf16"] if torch.cpu._is_avx512_bf16_supported() else flags
    return ["-mavx2", "-mfma"] if torch.cpu._is_avx2_supported() else []


@cache
def extension() -> Any:
    """The compiled source.

    Raises:
        OSError: there is no compiler, or no folder to keep the result in.
        RuntimeError: the compiler failed.
        ImportError: the result cannot be loaded.
    """
    path = compiled(instructions())
    try:
        return _load(path)
    except ImportError:  # it is empty, say, after the machine lost its power
        path.unlink()
        return _load(compiled(instructions()))


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(flags: Sequence[str]) -> Path:
    """The shared library made of the source with these flags; compiles it unless that was done before."""
    includes = [Path(torch.__file__).parent / "include", Path(sysconfig.get_paths()["include"])]
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O3", "-ffast-math", "-fopenmp", "-fPIC",
        "-fvisibility=hidden", "-Wno-psabi", *flags, *(f"-I{folder}" for folder in includes),
    ]  # fmt: skip
    source = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    key = hashlib.sha256(source + "\0".join([*command, torch.__version__]).encode())
    name = f"{NAME}_{key.hexdigest()[:16]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "vita_audio" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        _logger.info("compiling the engine's kernels for this CPU; this takes 10 to 20 seconds, once")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            object_file, library = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            _run([*command, f"-DMODULE={name}", "-c", str(SOURCE), "-o", str(object_file)])
            # Linked without -ffast-math, which would make every thread of the process round small numbers to zero.
            _run([command[0], "-shared", "-fopenmp", str(object_file), "-o", str(library)])
            library.replace(target)  # whole or not at all, whoever else compiles
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (line for line in done.stderr.splitlines() if " error: " in line)
        raise RuntimeError(next(lines, f"{command[0]} ended with status {done.returncode}"))


def fits(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether products can read inputs of these sizes: they take 32 bits at a time."""
    return all(size * dtype.itemsize % 4 == 0 for size in sizes)


def native(dtype: torch.dtype) -> Any:
    """The part of the extension for a type of weights, bfloat16 or float32."""
    return getattr(extension(), str(dtype).removeprefix("torch."))


def cache_shape(length: int, head_size: int) -> tuple[int, int]:
    """Places of a cache for ``length`` positions, and numbers per place; see ``Shape`` in the source."""
    return math.ceil(length / KEYS) * KEYS, math.ceil(head_size / OUTPUTS) * OUTPUTS


def best_ids(logits: Tensor) -> Tensor:
    """Ids of the highest logits, the first of equal ones: (..., vocabulary) -> (...)."""
    logits = logits.contiguous()
    ids = logits.new_empty(logits.shape[:-1], dtype=torch.long)
    native(logits.dtype).find_best(logits.data_ptr(), ids.data_ptr(), ids.numel(), logits.shape[-1])
    return ids


def memory(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor, in pages of 2 MiB if it is large and the system has them: fewer addresses to look up per byte read."""
    size = dtype.itemsize * math.prod(shape)
    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the pages
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


class PackedProduct:
    """y = x W^T + b for a fixed weight on a CPU; see :class:`~vita_audio.engine.kernels.Product`.

    A row's result does not depend on the rows beside it.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None):
        # A gate and the value that it lets through are used together, so they take turns in memory.
        alternate = len(weights) == 2 and len(weights[0]) == len(weights[1])
        weight, self.bias = joined(weights, biases)
        self.out_features, self.in_features = weight.shape
        parts = [_in_blocks(each) for each in (weights if alternate else [weight])]
        blocks = torch.stack(parts, dim=1)
        self._blocks = memory(blocks.shape, weight.dtype).copy_(blocks)
        bias = 0 if self.bias is None else self.bias.data_ptr()
        self.native = native(weight.dtype).Product(
            self._blocks.data_ptr(), bias, self.in_features, self.out_features, alternate
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads."""
        return self._blocks.itemsize * self.in_features * self.out_features

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """(n, in) -> (n, out); ``add`` (n, out) is added to the result."""
        x = x.contiguous()
        y = x.new_empty(len(x), self.out_features)
        added = None if add is None else add.contiguous()
        native(y.dtype).multiply(
            self.native,
            x.data_ptr(),
            0 if added is None else added.data_ptr(),
            y.data_ptr(),
            len(x),
            torch.get_num_threads(),
        )
        return y


def _in_blocks(weight: Tensor) -> Tensor:
    """(out, in) -> (blocks, in / n, OUTPUTS, n), zero where there are no more outputs; n numbers take 32 bits."""
    padded = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -len(weight) % OUTPUTS))
    return padded.unflatten(0, (-1, OUTPUTS)).unflatten(2, (-1, 4 // weight.itemsize)).transpose(1, 2)


class Backbone:
    """The backbone's layers and its norm, in one call.

    Args:
        layers: their products are :class:`PackedProduct`.
        shape: heads of queries, heads of keys, d_head.
    """

    def __init__(self, layers: Sequence[Layer], norm: Norm, shape: tuple[int, int, int]):
        self._memory = layers, norm  # lives as long as what follows
        self.shape = shape
        self.native = _stack(layers, norm)

    def __call__(self, caches: Sequence[Tensor], x: Tensor, window: Window) -> Tensor:
        """A window's inputs (n, d) -> normed outputs (n, d); keys and values go to the layers' caches."""
        x = x.contiguous()
        y = torch.empty_like(x)
        places = [cache.data_ptr() for cache in caches]
        native(x.dtype).run_backbone(
            self.native,
            places,
            x.data_ptr(),
            y.data_ptr(),
            shape_of(self.shape, caches[0], window.cos, window.sin),
            _window(window),
            torch.get_num_threads(),
        )
        return y


class HeadPass:
    """An MCTP head with the model's norm, in one call.

    Args:
        embedding: (vocabulary, d).
        shape: see :class:`Backbone`.
    """

    def __init__(self, head: Head, norm: Norm, embedding: Tensor, shape: tuple[int, int, int]):
        self._memory = head, norm  # lives as long as what follows
        self._embedding, self._shape = embedding, shape
        self.native = native(embedding.dtype).Head(
            _norm(head.embed_norm),
            _norm(head.hidden_norm),
            native_product(head.proj),
            _stack([head.layer], norm),
        )

    def __call__(self, cache: Tensor, tokens: Tensor, ahead: int, hidden: Tensor, window: Window) -> Tensor:
        """A window's states (n, d) -> normed outputs (n, d); keys and values go to the cache.

        Args:
            tokens: (all rows, length) ids; the head reads those ``ahead`` of the window's positions.
        """
        y = hidden.clone(memory_format=torch.contiguous_format)
        native(y.dtype).run_head(
            self.native,
            cache.data_ptr(),
            self._embedding.data_ptr(),
            tokens.data_ptr(),
            tokens.stride(0),
            ahead,
            y.data_ptr(),
            shape_of(self._shape, cache, window.cos, window.sin),
            _window(window),
            torch.get_num_threads(),
        )
        return y


def _norm(norm: Norm) -> Any:
    return native(norm.weight.dtype).Norm(norm.weight.data_ptr(), norm.eps)


def native_product(product: Any) -> Any:
    """A :class:`PackedProduct` as the kernels take it."""
    return product.native


def _stack(layers: Sequence[Layer], norm: Norm) -> Any:
    part = native(norm.weight.dtype)
    made = [
        part.Layer(
            _norm(layer.input_norm),
            native_product(layer.qkv),
            native_product(layer.out),
            _norm(layer.mlp_norm),
            native_product(layer.gate_up),
            native_product(layer.down),
            layer.window or 0,
        )
        for layer in layers
    ]
    return part.Stack(made, _norm(norm))


def shape_of(heads: tuple[int, int, int], cache: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """The shapes of attention as the kernels take them.

    Args:
        heads: see :class:`Backbone`. cache: of a layer.
        cos, sin: (all positions, d_head); see :meth:`~vita_audio.engine.weights.Weights.rotary`.
    """
    _, rows, _, places, _ = cache.shape
    return native(cache.dtype).Shape(*heads, rows, places, cos.data_ptr(), sin.data_ptr())


def _window(window: Window) -> Any:
    return extension().Window(
        window.rows.start,
        *window.positions.shape,
        len(window.cos),
        window.positions.data_ptr(),
        window.places.data_ptr(),
    )
