"""What a run shows beside its loss: accuracy, learning rates, gradient norms, speed, memory and data.

All of it is read when a line is logged; between two lines a step adds to sums on the device and waits for nothing.
Every process contributes: counts are summed over all, times and memory are those of the worst.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vita_audio.distributed import gather_objects
from vita_audio.models.compat import reduced_gradients
from vita_audio.training.machine import peak_flops
from vita_audio.training.planner import Setup, step_flops
from vita_audio.training.stages import part_of
from vita_audio.training.statistics import COUNT, PredictionSums, accuracies, breakdown
from vita_audio.training.step_memory import Batch


class CountingLoader(Protocol):
    """An endless source of batches that can report its position and what it has read."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def counts(self) -> dict[str, float]: ...


class TimedLoader:
    """A loader that notes how long the trainer waits for it.

    Attributes:
        seconds: waited since somebody set it to zero.
    """

    def __init__(self, loader: CountingLoader) -> None:
        self._loader = loader
        self.seconds = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self._loader)
        while True:
            start = time.perf_counter()
            try:
                with torch.profiler.record_function("wait for data"):
                    batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield batch


class Watch:
    """Collects a run's figures and turns them into columns of the log.

    Args:
        model: the model that trains.
        loader: this rank's rows.
        accumulation: micro-batches of a step.
        device: of the model.
        global_mean: the model's losses are shares of a mean over all ranks (``--loss_average global``).
        head_multiplier: ratio of the heads' learning rate to the model's.

    Attributes:
        batches: the loader, timed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        loader: CountingLoader,
        accumulation: int,
        device: torch.device,
        *,
        global_mean: bool,
    ) -> None:
        self.batches = TimedLoader(loader)
        self._model: Any = model  # of this family; PreTrainedModel does not know its config
        self._loader = loader
        self._accumulation = accumulation
        self._device = device
        self._global_mean = global_mean
        heads = model.config.num_nextn_predict_layers
        self._kinds: list[tuple[str, str]] = getattr(loader, "kinds", [])
        self._sums = PredictionSums(heads, max(1, len(self._kinds)), device)
        self._detail = torch.zeros(3, heads + 1, max(1, len(self._kinds)), dtype=torch.float64)
        self._parts: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._own_gradients = False
        self._micro_batches = 0
        self.start()

    def start(self) -> None:
        """Begin to count; called again when the training starts or continues."""
        self._since = time.perf_counter()
        self._counts = dict(self._loader.counts())
        self.batches.seconds = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A section whose time is none of the steps': a checkpoint or a validation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - start

    # -- between two lines --------------------------------------------------------------------------------

    def add(self, outputs: Any, kinds: Tensor | None) -> None:
        """Add a micro-batch's losses and hits."""
        self._micro_batches += 1
        parts = {}
        if getattr(outputs, "main_loss", None) is not None:
            parts["main_loss"] = outputs.main_loss
        if getattr(outputs, "mtp_losses", None) is not None:
            parts.update({f"mtp_loss_{k}": value for k, value in enumerate(outputs.mtp_losses)})
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        if getattr(outputs, "predictions", None) is not None:
            self._sums.add(outputs.predictions, kinds)

    def add_gradients(self, engine: Any = None) -> None:
        """Note the gradient norm of each part, before an update.

        Args:
            engine: DeepSpeed's, whose ranks hold a share of the reduced gradients each. None: every rank holds all.
        """
        pairs: list[tuple[Tensor, nn.Parameter]]
        self._own_gradients = engine is None
        if engine is None:
            pairs = [(p.grad, p) for p in self._model.parameters() if p.grad is not None]
        else:
            pairs = reduced_gradients(engine)
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        members: dict[str, list[Tensor]] = {}
        for gradient, parameter in pairs:
            if id(parameter) in names and gradient.numel():
                part = part_of(self._model, names[id(parameter)]).replace(" ", "_")
                members.setdefault(part, []).append(gradient.detach())
        self._squares = {
            part: torch.stack(torch._foreach_norm(gradients)).float().square().sum()
            for part, gradients in members.items()
        }

    # -- a line -------------------------------------------------------------------------------------------

    def columns(
        self, logs: Mapping[str, float], rates: list[float], *, steps: int, detailed: bool
    ) -> dict[str, float]:
        """The columns of a log line; the next line starts from zero. All ranks must call it.

        Args:
            logs: what the Trainer logs itself.
            rates: of the optimizer's groups.
            steps: optimizer steps since the last line.
            detailed: also tasks and sources, since the last detailed line.
        """
        sums = self._sums.take()
        self._detail += sums
        ours = self._this_rank(sums)
        ranks = gather_objects(ours)
        total = _added(ranks, "sums")
        columns = self._losses(ranks) | accuracies(total[:, :, None])
        columns |= {f"learning_rate/{part}": rate for part, rate in self._rates(rates).items()}
        columns |= self._norms(ranks, logs.get("grad_norm"))
        columns |= self._speed(ranks, total, steps)
        if detailed:
            columns |= breakdown(_added(gather_objects({"sums": self._detail}), "sums"), self._kinds)
            self._detail.zero_()
        self._parts, self._squares, self._micro_batches = {}, {}, 0
        self.start()
        return columns

    def _this_rank(self, sums: Tensor) -> dict[str, Any]:
        """What the other ranks must know. All small tensors cross to the host together."""
        small = {**{("part", k): v for k, v in self._parts.items()}}
        small |= {("square", k): v.to(self._device) for k, v in self._squares.items()}
        values = torch.stack([v.double() for v in small.values()]).tolist() if small else []
        read = dict(zip(small, values, strict=True))
        return {
            "sums": sums.sum(dim=2),
            "parts": {name: value for (kind, name), value in read.items() if kind == "part"},
            "squares": {name: value for (kind, name), value in read.items() if kind == "square"},
            "counts": self._loader.counts(),
            "before": self._counts,
            "seconds": time.perf_counter() - self._since,
            "waited": self.batches.seconds,
            "memory": peak_memory(self._device),
        }

    def _losses(self, ranks: list[dict[str, Any]]) -> dict[str, float]:
        # With --loss_average global, each rank's part is a share of the global mean: its sum was divided by the
        # items of all ranks. With rank, it is that rank's own mean.
        steps = max(1, self._micro_batches // self._accumulation)
        divisor = steps * (1 if self._global_mean else len(ranks))
        return {
            name: sum(one["parts"][name] for one in ranks) / divisor for name in sorted(ranks[0]["parts"])
        }

    def _rates(self, rates: list[float]) -> dict[str, float]:
        """The language model's groups come first, the heads' last."""
        if not rates:
            return {}
        heads = self._model.config.num_nextn_predict_layers > 0
        frozen = getattr(self._model, "has_frozen_backbone", False)
        return ({} if frozen else {"language_model": rates[0]}) | ({"heads": rates[-1]} if heads else {})

    def _norms(self, ranks: list[dict[str, Any]], whole: float | None) -> dict[str, float]:
        """Norms whose squares add up to that of the whole, before clipping and without a loss scale."""
        holders = ranks[:1] if self._own_gradients else ranks
        parts = sorted({part for one in holders for part in one["squares"]})
        squares = {part: sum(one["squares"].get(part, 0.0) for one in holders) for part in parts}
        together = math.sqrt(sum(squares.values()))
        if whole is None or not together or not math.isfinite(together):
            return {}
        return {f"grad_norm/{part}": math.sqrt(square) / together * whole for part, square in squares.items()}

    def _speed(self, ranks: list[dict[str, Any]], sums: Tensor, steps: int) -> dict[str, float]:
        counts = [one["counts"] for one in ranks]
        names = sorted({name for one in counts for name in one} - {"epoch", "tokens", "positions"})
        columns = {"data/epoch": counts[0]["epoch"]} if "epoch" in counts[0] else {}
        columns |= {f"data/{name}": sum(one.get(name, 0) for one in counts) for name in names}
        seconds = max(one["seconds"] for one in ranks)
        columns["data/wait_share"] = max(one["waited"] for one in ranks) / seconds
        columns["speed/step_seconds"] = seconds / max(1, steps)
        columns["speed/memory_gb"] = max(one["memory"] for one in ranks) / 1e9
        tokens, positions, documents = (
            sum(one["counts"].get(name, 0) - one["before"].get(name, 0) for one in ranks)
            for name in ("tokens", "positions", "used")
        )
        if positions:
            columns["data/fill"] = tokens / positions
            columns["speed/tokens_per_second"] = tokens / seconds / len(ranks)
            flops = self._flops(ranks, int(positions), tokens / max(1, documents), sums)
            dtype = next(self._model.parameters()).dtype
            columns["speed/mfu"] = flops / len(ranks) / seconds / peak_flops(self._device, dtype)
        return columns

    def _flops(self, ranks: list[dict[str, Any]], positions: int, document: float, sums: Tensor) -> float:
        """Operations of all ranks since the last line, by the planner's count, with documents of equal length."""
        batches = len(ranks) * self._micro_batches
        frozen = getattr(self._model, "has_frozen_backbone", False)
        supervised = float(sums[COUNT].max()) / positions
        batch = Batch(1, positions // batches, max(1, round(document)), supervised)
        needed, _ = step_flops(self._model.config, Setup(language_model_freeze=frozen, batch=batch))
        return float(needed * batches)


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process so far: of tensors on a GPU, of everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _added(ranks: list[dict[str, Any]], name: str) -> Tensor:
    return torch.stack([one[name] for one in ranks]).sum(dim=0)
