"""Cross-entropy at supervised positions only, in chunks, with the gradient computed along with the loss.

A row of 8,192 tokens, a vocabulary of 168,072 and eleven predictions a token would need 60 GB of
float32 logits. Here the hidden states of all supervised positions, of the backbone and of every
head, go through the LM head together in one call: a chunk of logits is computed, turned into losses
and into the gradients of its inputs, and freed. Nothing is recomputed, all terms share one gradient
buffer of the LM head, and memory grows with neither sequence x vocabulary nor the number of heads.

On CUDA with Liger installed its fused kernels do the same; the numbers agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from vita_audio.constants import IGNORE_INDEX

# Size of a chunk of logits: 64 MB in float32 on a CPU (larger products gain little); a GPU needs more.
CHUNK_LOGITS_CPU = 2**24
CHUNK_LOGITS_GPU = 2**27


class LanguageModelHead(nn.Linear):
    """The LM head, which also turns hidden states into losses without returning their logits.

    The loss is part of this module's ``forward`` so that ZeRO-3 gathers the weight for it as for
    any other call.

    Attributes:
        chunk_logits: logits computed at a time. None: as many as suit the device.
    """

    chunk_logits: int | None = None

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, scales: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Logits, or losses when targets are given.

        Args:
            hidden: (..., d); (rows, d) with targets.
            targets: (rows,) token ids.
            scales: (rows,) weight of each row in the total.

        Returns:
            Logits (..., vocabulary), or the scalar sum of scales x losses, and for each row, without gradient, its
            plain loss (rows,) and whether its target has the highest logit (rows,), bool.
        """
        if targets is None:
            return super().forward(hidden)
        # Under no_grad an autograd function still sees requires_grad and would compute an unused gradient.
        weight = self.weight if torch.is_grad_enabled() else self.weight.detach()
        return LinearCrossEntropy.apply(hidden, weight, targets, scales, self.chunk_logits)


class LinearCrossEntropy(torch.autograd.Function):
    """``(scales * cross_entropy(hidden @ weight.T, targets)).sum()``, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scales: Tensor,
        chunk_logits: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # Liger cannot cut zero rows (a batch without supervision) into chunks.
        use_liger = device == "cuda" and len(targets) > 0 and liger_forward() is not None
        compute: Callable[..., Any] = liger_losses if use_liger else chunked_losses
        if chunk_logits is not None:
            compute = partial(chunked_losses, chunk_logits=chunk_logits)
        with torch.autocast(device, enabled=False):
            losses, hits, grad_hidden, grad_weight = compute(
                hidden.to(dtype),
                weight.to(dtype),
                targets,
                scales,
                needs_hidden or needs_weight,
                needs_weight,
            )
        ctx.save_for_backward(
            grad_hidden.to(hidden.dtype) if grad_hidden is not None and needs_hidden else None,
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
        )
        ctx.mark_non_differentiable(losses, hits)
        return (scales * losses).sum(), losses, hits

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor, *_unused: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = (
            None if grad is None else grad * grad_total.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, None, None


def chunked_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Tensor,
    needs_grad: bool,
    needs_weight: bool,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses (rows,), hits (rows,) and the gradients of the losses' scaled sum.

    The gradients are of hidden (rows, d) and, in float32, of weight (vocabulary, d). A hit is a target with the
    highest logit.
    """
    rows, vocabulary = len(targets), len(weight)
    if chunk_logits is None:
        chunk_logits = CHUNK_LOGITS_CPU if hidden.device.type == "cpu" else CHUNK_LOGITS_GPU
    chunk_rows = min(rows, max(1, chunk_logits // vocabulary))
    losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    hits = torch.empty(rows, dtype=torch.bool, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs_grad else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    # All chunks use the same memory; fresh pages would cost a quarter of the time on a CPU.
    logits_buffer = hidden.new_empty(chunk_rows, vocabulary)
    half = logits_buffer.dtype != torch.float32
    probs_buffer = torch.empty_like(logits_buffer, dtype=torch.float32) if half else logits_buffer
    for start in range(0, rows, max(chunk_rows, 1)):
        chunk = slice(start, start + chunk_rows)
        target = targets[chunk, None]
        count = len(target)
        logits = torch.mm(hidden[chunk], weight.T, out=logits_buffer[:count])
        of_target = logits.gather(1, target).float()
        highest = logits.amax(dim=1, keepdim=True)
        hits[chunk] = (of_target == highest).squeeze(1)
        # In float32 the probabilities take the place of the logits: half the memory traffic.
        probs = torch.softmax(logits, dim=-1, dtype=torch.float32, out=probs_buffer[:count])
        # -log softmax(target), with log sum exp = highest - log of the highest probability.
        losses[chunk] = (highest.float() - probs.amax(dim=1, keepdim=True).log() - of_target).squeeze(1)
        if grad_hidden is None:
            continue
        # d loss / d logits = softmax - one_hot; the row's scale is applied later, to the smaller products.
        grad_logits = probs.scatter_add_(1, target, torch.full_like(of_target, -1))
        if half:
            grad_logits = logits.copy_(grad_logits)
        scale = scales[chunk, None]
        torch.mm(grad_logits, weight, out=grad_hidden[chunk]).mul_(scale)
        if grad_weight is None:
            continue
        scaled = (hidden[chunk] * scale).to(weight.dtype)
        if half:  # a sum over chunks needs float32
            grad_weight += grad_logits.T @ scaled
        else:
            grad_weight.addmm_(grad_logits.T, scaled)
    return losses, hits, grad_hidden, grad_weight


def liger_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, scales: Tensor, needs_grad: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same, by Liger's fused linear cross-entropy kernels."""
    forward = liger_forward()
    assert forward is not None  # the caller has asked
    losses, _, hits, _, grad_hidden, grad_weight, _ = forward(
        hidden,
        weight,
        targets,
        reduction="none",
        accum_dtype=torch.float32,
        return_token_accuracy=True,
        token_grad_output=scales,
        compute_gradients=needs_grad,
        weight_requires_grad=needs_weight,
    )
    return losses.float(), hits.bool(), grad_hidden, grad_weight


@lru_cache(maxsize=1)
def liger_forward() -> Callable[..., tuple[Any, ...]] | None:
    """Liger's forward function; None without Liger, or with a version too old to scale each row and to find hits."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward
    except ImportError:
        return None
    needed = {"token_grad_output", "return_token_accuracy"}
    accepted = inspect.signature(fused_linear_cross_entropy_forward).parameters
    return fused_linear_cross_entropy_forward if needed <= set(accepted) else None


def shifted_targets(labels: Tensor, documents: Tensor, shift: int) -> Tensor:
    """The label of each position for a prediction ``shift`` tokens ahead, never across a document boundary.

    Args:
        labels: (batch, time), not shifted, IGNORE_INDEX at unsupervised positions.
        documents: (batch, time), an id that differs between neighbouring documents.

    Returns:
        (batch, time), label t+shift, or IGNORE_INDEX.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    same_document = documents[:, shift:] == documents[:, :-shift]
    targets[:, :-shift] = labels[:, shift:].where(same_document, IGNORE_INDEX)
    return targets
