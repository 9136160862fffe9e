"""Cross-modal token prediction heads: a single head, and the cascade used in training.

A head reads the hidden state of position t and the embedding of a token further ahead, and
predicts the one after it (paper section 3.2; SPEC "Notation"). It is the MTP module of
DeepSeek-V3 with one difference: the state passed on is taken after the shared final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vita_audio.models.compat import checkpointing_function


@dataclass(frozen=True)
class MCTPHead:
    """Head k: a view of modules that the model owns (``modeling.py`` has their released names).

    For position t it takes h^k_t and token t+k+1 and returns h^{k+1}_t, from which the shared LM
    head predicts token t+k+2.
    """

    index: int
    embed_norm: nn.Module
    hidden_norm: nn.Module
    proj: nn.Linear
    layer: nn.Module
    final_norm: nn.Module

    def __call__(
        self,
        token_embeds: Tensor,
        hidden: Tensor,
        ahead: int = 0,
        **attention: Any,
    ) -> Tensor:
        """One pass of the head.

        Args:
            token_embeds: (batch, time, d), embeddings of tokens t+k+1, never the spliced audio.
            hidden: (batch, time, d), h^k_t; for head 0 the backbone's normed output.
            ahead: offset of the tokens t+k+1 in ``token_embeds``.
            attention: mask, cache and rotary embeddings (of positions t+k+1) for the decoder layer.

        Returns:
            (batch, time, d), h^{k+1}_t.
        """
        fuse: Callable[..., Tensor] = self.fuse
        norm: Callable[..., Tensor] = self.final_norm
        checkpoint = checkpointing_function(self.layer) if self.layer.training else None
        if checkpoint is not None:
            # With what the layer does itself, a head keeps three tensors (batch, time, d): its layer's input and
            # output, and what it returns.
            fuse, norm = partial(checkpoint, fuse), partial(checkpoint, norm)
        return norm(self.layer(fuse(token_embeds, hidden, ahead), **attention))

    def fuse(self, token_embeds: Tensor, hidden: Tensor, ahead: int = 0) -> Tensor:
        """x^k_t = W_k [norm(embedding) ; norm(hidden)], embedding first. Takes and returns (batch, time, d)."""
        if ahead:
            # Shifted inside the checkpoint, so no head keeps a shifted copy of the embeddings.
            token_embeds = token_embeds.roll(-ahead, dims=1)
        return self.proj(torch.cat([self.embed_norm(token_embeds), self.hidden_norm(hidden)], dim=-1))


def run_cascade(
    heads: list[MCTPHead],
    token_embeds: Tensor,
    hidden: Tensor,
    position_ids: Tensor,
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    **attention: Any,
) -> Iterator[Tensor]:
    """Run every head over whole rows, as in training; yields h^1, h^2, … each (batch, time, d).

    Rows keep their length. Inputs that reach past the end of a document (t > n-k-2) are computed
    from the wrong token, but they are the last of their document: no valid position attends to them,
    and they have no label. So all heads share the backbone's attention mask.

    Args:
        token_embeds: (batch, time, d), plain embeddings of the row's own tokens.
        hidden: (batch, time, d), the backbone's normed output.
        position_ids: (batch, time), restarting at 0 with each document.
        rotary: the model's rotary embedding, (hidden, position_ids) -> (cos, sin).
    """
    for head in heads:
        ahead = head.index + 1
        hidden = head(
            token_embeds,
            hidden,
            ahead=ahead,
            position_embeddings=rotary(hidden, position_ids + ahead),
            position_ids=position_ids,
            **attention,
        )
        yield hidden
