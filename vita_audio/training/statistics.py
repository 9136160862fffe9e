"""Loss and accuracy of every head, task and source, summed on the device and read when a line is logged.

Each supervised prediction adds its loss, and whether it hit, to the cell of its head and of its document's kind
(source and task). The sums stay on the device, so a step waits for nothing; reading them is one transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vita_audio.models.modeling import Predictions

COUNT, LOSS, HITS = range(3)
"""What the first dimension of all sums holds."""


class PredictionSums:
    """Sums since the last reading.

    Args:
        heads: heads of the model, without the backbone.
        kinds: numbers that a batch's ``kinds`` may hold.
        device: of the model.
    """

    def __init__(self, heads: int, kinds: int, device: torch.device) -> None:
        self._shape = (3, heads + 1, kinds)
        self._sums = torch.zeros(3, (heads + 1) * kinds, dtype=torch.float64, device=device)

    def add(self, predictions: Predictions, kinds: Tensor | None) -> None:
        """Add a batch.

        Args:
            predictions: of the batch.
            kinds: (batch, time); None: there is one kind.
        """
        cell = predictions.head * self._shape[2]
        if kinds is not None:
            cell = cell + kinds.flatten()[predictions.position]
        ones = torch.ones_like(predictions.loss)
        values = torch.stack([ones, predictions.loss, predictions.hit.to(ones.dtype)])
        self._sums.index_add_(1, cell, values.double())

    def take(self) -> Tensor:
        """The sums (3, heads + 1, kinds) on the CPU; they start again at zero. Waits for the device."""
        sums = self._sums.view(self._shape).to("cpu", copy=True)
        self._sums.zero_()
        return sums


def accuracies(sums: Tensor) -> dict[str, float]:
    """``main_accuracy`` and ``mtp_accuracy_0`` …: the share of hits.

    Args:
        sums: (3, heads + 1, kinds).
    """
    return _rates(sums.sum(dim=2), (HITS,))


def breakdown(sums: Tensor, kinds: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean loss and accuracy of each task and source.

    ``task/asr/main_loss``, ``task/asr/mtp_loss_0`` …, ``task/asr/main_accuracy`` …; of each source the heads'
    mean only, ``source/NAME/mtp_loss``.

    Args:
        sums: (3, heads + 1, kinds).
        kinds: source and task of each kind.
    """
    values: dict[str, float] = {}
    for task in _unique(task for _, task in kinds):
        chosen = [index for index, (_, own) in enumerate(kinds) if own == task]
        rates = _rates(sums[:, :, chosen].sum(dim=2), (LOSS, HITS))
        values |= {f"task/{_tag(task.lower())}/{name}": value for name, value in rates.items()}
    for source in _unique(source for source, _ in kinds):
        chosen = [index for index, (own, _) in enumerate(kinds) if own == source]
        of_source = sums[:, :, chosen].sum(dim=2)
        together = torch.stack([of_source[:, 0], of_source[:, 1:].sum(dim=1)], dim=1)
        rates = _rates(together, (LOSS, HITS))
        values |= {f"source/{_tag(source)}/{name.removesuffix('_0')}": value for name, value in rates.items()}
    return values


def _rates(sums: Tensor, wanted: Iterable[int]) -> dict[str, float]:
    """Sums (3, heads + 1) divided by their counts; heads without predictions are left out."""
    names = {LOSS: "loss", HITS: "accuracy"}
    values = {}
    for what in wanted:
        for head, (count, total) in enumerate(zip(sums[COUNT].tolist(), sums[what].tolist(), strict=True)):
            if count:
                name = f"main_{names[what]}" if head == 0 else f"mtp_{names[what]}_{head - 1}"
                values[name] = total / count
    return values


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _tag(name: str) -> str:
    """A name that TensorBoard shows unchanged."""
    return name.replace(" ", "_")
