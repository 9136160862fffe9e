"""``--torch_compile``: the norms, attention and MLP of every decoder layer and head, each compiled in place.

A whole model would be compiled again for every packed row, whose documents decide the shapes inside attention. The
parts have the shape of the row, which never changes, so each kind is compiled once and serves all layers. Attention
itself runs as without the option; its projections and rotary embedding are compiled.

Whole layers are no choice: transformers checkpoints inside a layer's ``forward``, where torch.compile would silently
run everything as before. Weights keep their names, since modules are compiled in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm

from vita_audio.models.attention import FLASH, PACKED_SDPA, packed_flash_attention, packed_sdpa_attention

_PARTS = (Qwen2Attention, Qwen2MLP, Qwen2RMSNorm)


def compile_layers(model: nn.Module, backend: str = "inductor", mode: str | None = None) -> None:
    """Compile the parts of a model's layers when they first run.

    Args:
        backend: of torch.compile.
        mode: of torch.compile. None: its default.
    """
    for name, function in ((PACKED_SDPA, packed_sdpa_attention), (FLASH, packed_flash_attention)):
        AttentionInterface.register(name, torch.compiler.disable(function))
    for module in model.modules():
        if isinstance(module, _PARTS):
            module.compile(backend=backend, mode=mode)


@contextmanager
def not_compiled() -> Iterator[None]:
    """Run compiled modules as they were written, for inputs of ever-changing length."""
    with torch.compiler.set_stance("force_eager"):
        yield
