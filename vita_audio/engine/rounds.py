"""One round: the backbone reads what is new and makes its tokens, then the heads make theirs.

A round runs for several rows at once. Each takes part in as many passes as its schedule says; the state has these
numbers on the device, and everything that fixes the shapes of a round stands in its :class:`Plan`. Nothing is read
back to the host inside a round, with one exception: on a CPU, where this costs nothing, a projection looks whether all
rows are inside speech and then reads the rows of speech only.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vita_audio.engine.requests import Request
from vita_audio.engine.sampling import (
    Drawing,
    Rules,
    best_ids,
    between_markers,
    distribution,
    only_speech,
    pick,
    project,
)
from vita_audio.engine.speculation import accept_greedy, accept_sampled
from vita_audio.engine.state import State, Window
from vita_audio.engine.steps import backbone_pass, emit, head_window, run_head
from vita_audio.engine.weights import Weights

BURST = 4
"""Backbone passes of one round, at most; longer runs of a schedule take several rounds."""


PLAIN = Drawing()


@dataclass(frozen=True)
class Plan:
    """The shapes of a round.

    Attributes:
        first, last: the rows ``first`` … ``last`` - 1 take part.
        width: the most tokens that a row's first backbone pass reads.
        head_width: the most positions that a row's heads compute.
        length: the cached positions that passes read, at least those of the longest row at the end of the round.
        backbone_steps, head_steps: passes of the row that takes most.
        together: all rows take part in all passes.
        exact: there is one row, and ``length`` is its length at the last backbone pass.
        lossless: some row has drafts or will have.
        heads_speak: every row's heads choose speech tokens only.
        speech: some row reads the rows of speech where it can.
        check: some row wants its choices among them checked.
        drawing: what the sampling options have in common.
    """

    first: int
    last: int
    width: int
    head_width: int
    length: int
    backbone_steps: int
    head_steps: int
    together: bool = False
    exact: bool = False
    lossless: bool = False
    heads_speak: bool = False
    speech: bool = False
    check: bool = False
    drawing: Drawing = PLAIN

    @property
    def rows(self) -> slice:
        """The rows that take part."""
        return slice(self.first, self.last)

    @property
    def heads_follow(self) -> bool:
        """Whether the heads compute the very positions of the only backbone pass."""
        return self.exact and self.backbone_steps == 1 and self.head_width == self.width


@dataclass(frozen=True)
class Shapes:
    """The shapes that rounds may have. On a CPU all, on a GPU few, so that each is recorded once.

    Attributes:
        num_heads: of the model.
        longest: the state's length.
        exact: shapes are what they must be at least.
    """

    num_heads: int
    longest: int
    exact: bool

    def width(self, needed: int) -> int:
        """Tokens of the first backbone pass: one, a full round, or a prompt."""
        full = self.num_heads + 1
        return needed if self.exact or needed == 1 or needed > full else full

    def head_width(self, needed: int) -> int:
        """Positions of the heads' window: a round of one backbone pass, of a burst, two rounds, a short prompt."""
        sizes = (0, self.num_heads + 1, self.num_heads + BURST, 2 * self.num_heads + 1, 64)
        return needed if self.exact else next((size for size in sizes if size >= needed), needed)

    def length(self, needed: int) -> int:
        """Cached positions that are read."""
        return needed if self.exact else min(max(256, 1 << (needed - 1).bit_length()), self.longest)

    def key(self, part: str, plan: Plan) -> Hashable | None:
        """Names a recording of a round's part; None for shapes that seldom come back."""
        if part == "read":
            return None if plan.width > self.num_heads + 1 else (part, plan)
        return None if plan.head_width > 64 else (part, replace(plan, width=0))


@dataclass(frozen=True)
class Modes:
    """Options of rows on the device, (rows,) bool each.

    Attributes:
        lossless: see :class:`~vita_audio.engine.requests.Request`.
        between: reads the rows of speech between the markers. heads_speak: for all tokens of heads as well.
        check: its restricted choices are checked.
    """

    lossless: Tensor
    between: Tensor
    heads_speak: Tensor
    check: Tensor

    @classmethod
    def of(cls, rows: int, device: torch.device) -> Modes:
        """All off."""
        return cls(*(torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(4)))

    def set(self, row: int, request: Request) -> None:
        """Give a row its request's options."""
        self.lossless[row] = request.lossless
        self.between[row] = request.audio_rows != "off"
        self.heads_speak[row] = request.audio_rows == "on"
        self.check[row] = request.audio_rows == "auto" and not request.lossless

    def of_rows(self, rows: slice) -> Modes:
        """The same for some rows, sharing memory."""
        return Modes(self.lossless[rows], self.between[rows], self.heads_speak[rows], self.check[rows])

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.lossless, self.between, self.heads_speak, self.check


@dataclass
class Checks:
    """Restricted choices that no full projection has checked yet, and what checks found.

    Attributes:
        hidden: (rows, steps, d). tokens: (rows, steps) ids; -1: nothing to check.
        disagreements: (rows,) counts.
    """

    hidden: Tensor
    tokens: Tensor
    disagreements: Tensor

    @classmethod
    def of(cls, weights: Weights, rows: int) -> Checks:
        """Room for the tokens of a round of ``rows`` rows."""
        steps = BURST + weights.num_heads
        return cls(
            hidden=torch.zeros(rows, steps, weights.d, dtype=weights.dtype, device=weights.device),
            tokens=torch.full((rows, steps), -1, device=weights.device),
            disagreements=torch.zeros(rows, dtype=torch.long, device=weights.device),
        )

    def of_rows(self, rows: slice) -> Checks:
        """The same for some rows, sharing memory."""
        return Checks(self.hidden[rows], self.tokens[rows], self.disagreements[rows])

    def note(self, slot: int, hidden: Tensor, tokens: Tensor, wanted: Tensor) -> None:
        """Remember one choice of each row where it is ``wanted``: states (rows, d), ids (rows,)."""
        self.hidden[:, slot] = torch.where(wanted[:, None], hidden, self.hidden[:, slot])
        self.tokens[:, slot] = torch.where(wanted, tokens, self.tokens[:, slot])

    def compare(self, best: Tensor) -> None:
        """Count the remembered tokens that differ from the best of all rows, (rows * steps,), and forget them."""
        differ = (self.tokens >= 0) & (self.tokens != best.view_as(self.tokens))
        self.disagreements += differ.sum(dim=1)
        self.tokens.fill_(-1)


@dataclass
class Round:
    """One round: :meth:`read`, then :meth:`go_on`.

    Attributes:
        rules, modes: options of the plan's rows.
        used: (rows, vocabulary) bool, the tokens that the repetition penalty counts; None: nobody has one.
        draft_probabilities: (rows, heads, vocabulary), what drafts were drawn from; None: nobody draws drafts.
        checks: None: nobody wants checks.
        prompt: (rows * width, d), inputs of the first backbone pass that are not plain embeddings; else None.
    """

    weights: Weights
    state: State
    plan: Plan
    rules: Rules
    modes: Modes
    used: Tensor | None = None
    draft_probabilities: Tensor | None = None
    checks: Checks | None = None
    prompt: Tensor | None = None
    _read: tuple[Window, Tensor] | None = field(default=None, init=False)
    """What the first backbone pass computed."""

    def read(self) -> None:
        """The first backbone pass and the token that it makes."""
        state, plan = self.state, self.plan
        passes = state.backbone_steps[plan.rows]
        state.starts[plan.rows] = state.known[plan.rows] - state.drafts[plan.rows]
        active = None if plan.together else passes > 0
        length = plan.length - (plan.backbone_steps - 1) if plan.exact else plan.length
        window, output = self._read = backbone_pass(
            self.weights, state, plan.rows, active, plan.width, length, plan.exact, self.prompt
        )
        hidden = output.unflatten(0, window.positions.shape)
        if plan.lossless:
            self._verify(hidden)
        else:
            self._choose(hidden[:, -1], active, 0)

    def go_on(self) -> None:
        """The other backbone passes, the heads, and the report."""
        plan, rows = self.plan, self.plan.rows
        passes, head_passes = self.state.backbone_steps[rows], self.state.head_steps[rows]
        for step in range(1, plan.backbone_steps):
            active = None if plan.together else passes > step
            length = plan.length - (plan.backbone_steps - 1 - step) if plan.exact else plan.length
            _, hidden = backbone_pass(self.weights, self.state, rows, active, 1, length, plan.exact)
            self._choose(hidden, active, step)
        if plan.head_steps:
            self._run_heads(head_passes)
        self._settle(head_passes)

    def _run_heads(self, head_passes: Tensor) -> None:
        weights, state, plan = self.weights, self.state, self.plan
        rows, permanent = plan.rows, self.used
        if plan.lossless and permanent is not None:
            self.used = permanent.clone()  # a draft counts once it is accepted
        if plan.heads_follow and self._read is not None:
            window, hidden = self._read
        else:
            window, hidden = head_window(weights, state, rows, head_passes, plan.head_width, plan.length)
        shape = window.positions.shape
        for index in range(plan.head_steps):
            hidden = run_head(weights, state, index, hidden, window)
            active = None if plan.together else head_passes > index
            tokens = self._choose(hidden.unflatten(0, shape)[:, -1], active, index, by_head=True)
            if plan.lossless and permanent is not None:
                count(permanent, tokens, (head_passes > index) & ~self.modes.lossless)

    def _settle(self, head_passes: Tensor) -> None:
        """Move the lengths of the heads that ran, note the drafts, and report the tokens."""
        state, rows = self.state, self.plan.rows
        ran = torch.arange(self.weights.num_heads, device=head_passes.device) < head_passes[:, None]
        state.seen_heads[rows] = torch.where(ran, state.seen[rows][:, None], state.seen_heads[rows])
        state.drafts[rows] = head_passes * self.modes.lossless
        drafts = state.drafts[rows]
        head = torch.stack([state.known[rows] - drafts, drafts, state.seen[rows]], dim=1)
        ids = state.starts[rows][:, None] + state.columns[: state.most]
        state.report[rows] = torch.cat(
            [head, state.seen_heads[rows], state.tokens[rows].gather(1, ids)], dim=1
        )

    def _choose(self, hidden: Tensor, active: Tensor | None, step: int, by_head: bool = False) -> Tensor:
        """Choose a token for each row from its hidden state, (rows, d); append it to the active rows (None: all)."""
        weights = self.weights
        restricted = self._restricted(by_head)
        audio_only = restricted is not None and self._only_speech(restricted, active, by_head)
        first_id = weights.audio_rows.begin if audio_only and weights.audio_rows is not None else 0
        checking = self.checks is not None and not by_head and step == 0 and not audio_only
        if self.checks is not None and checking:
            # The full projection reads the weights anyway: a few more states cost nothing.
            pending = self.checks.hidden.flatten(0, 1)
            every = project(weights, torch.cat([hidden, pending]), None, False)
            self.checks.compare(best_ids(every[len(hidden) :]))
            logits = every[: len(hidden)]
            if restricted is not None:
                logits = only_speech(weights, logits, restricted)
        else:
            logits = project(weights, hidden, restricted, audio_only)
        if self.plan.drawing.plain:
            tokens = best_ids(logits)
            if first_id:
                tokens = tokens + first_id
        else:
            probabilities = distribution(logits, self.rules, self.plan.drawing, self.used, first_id)
            # Each pass has its column, after those of the drafts: company changes no row's draws.
            draw = weights.num_heads + (BURST + step if by_head else step)
            tokens = pick(probabilities, self.state.uniforms[self.plan.rows, draw]) + first_id
            if by_head and self.draft_probabilities is not None:
                drafted = self.draft_probabilities[:, step]
                drafted.zero_()
                drafted[:, first_id : first_id + logits.shape[1]] = probabilities
        emit(self.state, self.plan.rows, active, tokens)
        if self.used is not None:
            count(self.used, tokens, active)
        if self.checks is not None and restricted is not None:
            slot = BURST + step if by_head else step
            wanted = restricted & self.modes.check
            self.checks.note(slot, hidden, tokens, wanted if active is None else wanted & active)
        return tokens

    def _verify(self, hidden: Tensor) -> None:
        """Accept drafts and choose the token that follows; rows without drafts choose their next token.

        Args:
            hidden: (rows, width, d).
        """
        weights, state, plan = self.weights, self.state, self.plan
        rows, num_heads = plan.rows, weights.num_heads
        drafts = state.drafts[rows]
        confirmed = state.known[rows] - drafts
        # Column i of what follows belongs to the token after the first i drafts.
        columns = torch.arange(num_heads + 1, device=drafts.device)
        ids = state.tokens[rows].gather(1, confirmed[:, None] + columns[:-1])
        places = (plan.width - 1 - drafts[:, None] + columns).clamp(max=plan.width - 1)
        wanted = hidden.gather(1, places[:, :, None].expand(-1, -1, weights.d))
        logits = project(weights, wanted.flatten(0, 1), None, False).unflatten(0, (len(drafts), -1))
        if (restricted := self._restricted(by_head=False)) is not None:  # of rows without drafts
            logits[:, 0] = only_speech(weights, logits[:, 0], restricted & ~self.modes.lossless)
        if plan.drawing.plain:
            accepted, following = accept_greedy(ids, drafts, best_ids(logits))
        else:
            p = torch.stack([self._target(logits[:, i], ids[:, :i]) for i in range(num_heads + 1)], dim=1)
            q = torch.zeros_like(p[:, 1:]) if self.draft_probabilities is None else self.draft_probabilities
            accepted, following = accept_sampled(ids, drafts, p, q, state.uniforms[rows, : num_heads + 1])
        active = state.backbone_steps[rows] > 0
        known = confirmed + accepted
        state.known[rows] = torch.where(active, known, state.known[rows])
        state.seen[rows] = torch.where(active, known, state.seen[rows])
        # What heads computed from rejected drafts is forgotten. Head k reads k + 1 tokens ahead.
        valid = (known[:, None] - 1 - columns[:-1]).clamp(min=0)
        state.seen_heads[rows] = torch.minimum(state.seen_heads[rows], valid)
        emit(state, rows, active, following)
        if self.used is not None:
            for i in range(num_heads):
                count(self.used, ids[:, i], active & (accepted > i))
            count(self.used, following, active)

    def _target(self, logits: Tensor, drafts: Tensor) -> Tensor:
        """The backbone's distribution (rows, vocabulary) after these drafts, (rows, n)."""
        used = None if self.used is None else self.used.scatter(1, drafts, True)
        return distribution(logits, self.rules, self.plan.drawing, used, 0)

    def _restricted(self, by_head: bool) -> Tensor | None:
        """Which rows choose among speech tokens now, (rows,) bool; None for none."""
        if not self.plan.speech:
            return None
        state, rows = self.state, self.plan.rows
        last = state.tokens[rows].gather(1, state.known[rows][:, None] - 1).squeeze(1)
        restricted = between_markers(self.weights, last) & self.modes.between
        return restricted | self.modes.heads_speak if by_head else restricted

    def _only_speech(self, restricted: Tensor, active: Tensor | None, by_head: bool) -> bool:
        if by_head and self.plan.heads_speak:
            return True
        if active is not None:
            restricted = restricted | ~active
        return restricted.device.type == "cpu" and bool(restricted.all())


def count(used: Tensor, tokens: Tensor, active: Tensor | None) -> None:
    """Mark one token of each active row (None: all) as used: (rows, vocabulary), (rows,), (rows,) bool."""
    place = tokens[:, None]
    used.scatter_(1, place, True if active is None else used.gather(1, place) | active[:, None])
