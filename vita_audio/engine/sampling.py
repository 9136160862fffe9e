"""From hidden states to tokens, on the device: projection onto the vocabulary or its speech rows, rules, draws.

The rules are those of transformers' processors, in their order: repetition penalty, temperature, top-k, top-p. A draw
is a function of a distribution and a number in [0, 1): each request brings its own numbers, so its tokens do not
depend on its company. Greedy choice is a distribution with one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vita_audio.engine.kernels import cpu_kernels
from vita_audio.engine.requests import Sampling
from vita_audio.engine.weights import Weights


@dataclass(frozen=True)
class Rules:
    """The sampling options of rows, on the device.

    Attributes:
        sampled: (rows,) bool; the others are greedy.
        temperature, top_p, penalty: (rows,) float32. top_k: (rows,), 0 keeps all.
    """

    sampled: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> Rules:
        """Greedy rows."""
        ones = torch.ones(rows, device=device)
        return cls(
            sampled=torch.zeros(rows, dtype=torch.bool, device=device),
            temperature=ones,
            top_k=torch.zeros(rows, dtype=torch.long, device=device),
            top_p=ones.clone(),
            penalty=ones.clone(),
        )

    def set(self, row: int, options: Sampling) -> None:
        """Give a row its options."""
        self.sampled[row] = options.do_sample
        self.temperature[row] = options.temperature
        self.top_k[row] = options.top_k
        self.top_p[row] = options.top_p
        self.penalty[row] = options.repetition_penalty

    def of_rows(self, rows: slice) -> Rules:
        """The same for some rows, sharing memory."""
        return Rules(
            self.sampled[rows], self.temperature[rows], self.top_k[rows], self.top_p[rows], self.penalty[rows]
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.sampled, self.temperature, self.top_k, self.top_p, self.penalty


@dataclass(frozen=True)
class Drawing:
    """What the sampling options of a round's rows have in common; it fixes which operations run.

    Attributes:
        plain: every row is greedy, without a penalty.
        penalty: some row has one.
        largest_k: the largest top-k of a sampled row; 0 without.
        top_p: some sampled row cuts by probability.
    """

    plain: bool = True
    penalty: bool = False
    largest_k: int = 0
    top_p: bool = False

    @classmethod
    def of(cls, options: Sequence[Sampling]) -> Drawing:
        """For rows with these options."""
        drawn = [each for each in options if each.do_sample]
        penalty = any(each.repetition_penalty != 1 for each in options)
        return cls(
            plain=all(each.greedy for each in options),
            penalty=penalty,
            largest_k=max((each.top_k for each in drawn), default=0),
            top_p=any(each.top_p < 1 for each in drawn),
        )


def best_ids(logits: Tensor) -> Tensor:
    """Ids of the highest logits, the first of equal ones: (..., vocabulary) -> (...).

    On CPUs ``argmax`` takes five times as long as this in bfloat16.
    """
    if (own := cpu_kernels(logits.device, logits.dtype)) is not None:
        ids: Tensor = own.best_ids(logits)
        return ids
    return logits.max(dim=-1).indices


def project(weights: Weights, hidden: Tensor, restricted: Tensor | None, audio_only: bool) -> Tensor:
    """Logits of hidden states.

    Args:
        hidden: (rows, d), normed.
        restricted: (rows,) bool: rows that may choose speech tokens only; None for none.
        audio_only: all rows are restricted: read the rows of speech alone.

    Returns:
        (rows, vocabulary), or (rows, speech rows) with ``audio_only``.
    """
    if audio_only:
        assert weights.audio_head is not None
        return weights.audio_head(hidden)
    logits = weights.lm_head(hidden)
    return logits if restricted is None else only_speech(weights, logits, restricted)


def only_speech(weights: Weights, logits: Tensor, restricted: Tensor) -> Tensor:
    """Logits (rows, vocabulary) with minus infinity for the text ids of restricted rows, (rows,) bool."""
    assert weights.audio_rows is not None
    text = torch.arange(logits.shape[1], device=logits.device) < weights.audio_rows.begin
    return logits.masked_fill(restricted[:, None] & text, -torch.inf)


def between_markers(weights: Weights, last: Tensor) -> Tensor:
    """Whether the tokens ``last``, of any shape, leave their rows inside speech."""
    assert weights.audio_rows is not None
    return (last >= weights.audio_rows.begin) & (last != weights.audio_rows.end)


def distribution(
    logits: Tensor, rules: Rules, drawing: Drawing, used: Tensor | None, first_id: int
) -> Tensor:
    """Probabilities of the next token under the rules.

    Args:
        logits: (rows, n), of the ids from ``first_id`` on.
        used: (rows, vocabulary) bool, for the penalty; None: nobody has one.

    Returns:
        (rows, n) float32.
    """
    scores = logits.float()
    if used is not None:
        ours = used[:, first_id : first_id + scores.shape[1]]
        penalty = rules.penalty[:, None]
        scores = torch.where(ours, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    best = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
    scores = scores / rules.temperature[:, None]
    if drawing.largest_k:
        k = min(drawing.largest_k, scores.shape[1])
        kth = scores.topk(k).values.gather(1, (rules.top_k.clamp(1, k) - 1)[:, None])
        scores = scores.masked_fill((rules.top_k > 0)[:, None] & (scores < kth), -torch.inf)
    if drawing.top_p:
        ordered, ids = scores.sort(dim=1)
        cut = ordered.softmax(dim=1).cumsum(dim=1) <= 1 - rules.top_p[:, None]
        cut[:, -1] = False
        cut &= (rules.top_p < 1)[:, None]
        scores = scores.masked_fill(cut.scatter(1, ids, cut), -torch.inf)
    return torch.where(rules.sampled[:, None], scores.softmax(dim=1), best)


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one index per row by inverting the distribution function.

    Args:
        probabilities: (rows, n), not necessarily of sum 1.
        uniforms: (rows,) float64 in [0, 1).

    Returns:
        (rows,) indices; one of probability 0 is never chosen.
    """
    sums = probabilities.double().cumsum(dim=1)
    target = uniforms[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True).squeeze(1).clamp(max=probabilities.shape[1] - 1)
