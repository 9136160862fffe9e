"""A second device without a GPU: tensors that compute on the CPU and refuse to meet the CPU's own.

A tensor here says ``meta`` when asked for its device, the one device besides the CPU that every torch has, and holds
real values, so code that reads a value back runs as well. As on CUDA, an operation may take tensors of one device
only, scalars of the CPU excepted; ``.to("meta")`` and ``.cpu()`` move, and factories with ``device=`` make.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray}


class Elsewhere(Tensor):
    """A tensor of the second device; ``content`` holds its values."""

    content: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.content = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class SecondDevice(ExitStack):
    """While it is entered, ``device="meta"`` means the second device."""

    def __enter__(self) -> SecondDevice:
        super().__enter__()
        self.enter_context(_Values())
        self.enter_context(_Operations())
        return self


def move(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers, and nothing else that it holds, as ``.to(device)`` does."""
    for each in module.modules():
        for held in (each._parameters, each._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, Elsewhere):
                    moved = Elsewhere(tensor.detach())
                    held[name] = nn.Parameter(moved, False) if isinstance(tensor, nn.Parameter) else moved
    return module


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


class _Values(TorchFunctionMode):
    """Functions that take values from Python, which torch drops when the device is meta."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _FROM_PYTHON and _is_here(kwargs.get("device")):
            made: Tensor = function(*args, **{**kwargs, "device": "cpu"})
            return made.to(DEVICE)
        if function is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].content.tolist()
        return function(*args, **kwargs)


def _compute(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the values and put its results where they belong."""
    if function is torch.ops.aten._fused_sdp_choice.default:
        return 0  # the plain one: each of the others belongs to a device
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    strange = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    if here and strange and function not in _MOVES:
        shapes = [tuple(tensor.shape) for tensor in strange]
        raise RuntimeError(f"{function}: not on the same device: {shapes} on the CPU, others elsewhere")
    if "device" in kwargs:
        target = kwargs["device"]
        here = here if target is None else _is_here(target)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    originals = {id(tensor.content): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    real_args, real_kwargs = tree_map(_value, (args, kwargs))
    result = function(*real_args, **real_kwargs)
    if function is torch.ops.aten.copy_.default:
        return args[0]
    if not here:
        return result

    def belongs(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return originals.get(id(leaf)) if id(leaf) in originals else Elsewhere(leaf)

    return tree_map(belongs, result)


def _value(leaf: Any) -> Any:
    return leaf.content if isinstance(leaf, Elsewhere) else leaf


def _is_here(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type
