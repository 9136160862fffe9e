"""Whole rounds of greedy rows on a CPU in one call each; the work is done in ``cpu_rounds.h``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vita_audio.engine.cpu_kernels import extension, native, native_product, shape_of
from vita_audio.engine.rounds import BURST, Checks, Modes
from vita_audio.engine.state import State
from vita_audio.engine.weights import Weights

COLUMNS = (
    "tokens", "known", "seen", "seen_heads", "drafts", "starts", "backbone_steps", "head_steps", "report", "hidden",
)  # fmt: skip
"""What the kernels read and write of a state, besides its caches."""


class GreedyRounds:
    """Runs a round in one call, for rows that are greedy and have no repetition penalty.

    The state is then as after a :class:`~vita_audio.engine.rounds.Round`, but nothing is computed after the end of a
    reply.

    Args:
        modes: options of all rows.
    """

    def __init__(self, weights: Weights, state: State, modes: Modes):
        self._memory = weights, state, modes
        part, speech = native(weights.dtype), weights.audio_rows
        backbone, heads = weights.backbone_pass, weights.head_passes
        assert backbone is not None
        columns = {name: getattr(state, name) for name in COLUMNS}
        columns |= {"lossless": modes.lossless, "between": modes.between}
        columns |= {"heads_speak": modes.heads_speak, "check": modes.check}
        model = part.Model(
            weights.embedding.data_ptr(),
            backbone.native,
            [head.native for head in heads],
            native_product(weights.lm_head),
            native_product(weights.audio_head or weights.lm_head),
            0 if speech is None else speech.begin,
            0 if speech is None else speech.end,
            shape_of(backbone.shape, state.caches[0], state.cos, state.sin),
            [cache.data_ptr() for cache in state.caches],
        )
        rows = extension().Rows(
            {name: column.data_ptr() for name, column in columns.items()},
            state.tokens.stride(0),
            state.report.stride(0),
            weights.num_heads,
            state.length + 1,
        )
        self._native = part.Rounds(model, rows)

    def __call__(
        self,
        first: int,
        last: int,
        prompt: Tensor | None,
        ends: Sequence[tuple[int, Sequence[int]]],
        checks: Checks | None,
    ) -> None:
        """A round of the rows ``first`` … ``last`` - 1.

        Args:
            prompt: (tokens, d), inputs of the first backbone pass that are not plain embeddings.
            ends: for each row, how many more tokens its reply may have, and the ids that end it.
            checks: of all rows; None: nobody wants any.
        """
        prompt = None if prompt is None else prompt.contiguous()
        self._native.run(
            first,
            last,
            0 if prompt is None else prompt.data_ptr(),
            ends,
            None if checks is None else _checks(checks),
            torch.get_num_threads(),
        )


def _checks(checks: Checks) -> Any:
    columns = checks.hidden, checks.tokens, checks.disagreements
    return extension().Checks(checks.tokens.shape[1], BURST, *(column.data_ptr() for column in columns))
