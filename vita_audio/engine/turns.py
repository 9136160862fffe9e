"""Runs turns: chunks of prompts, and rounds. Keeps the host's account of rows in step with the device's."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vita_audio.engine.cpu_rounds import GreedyRounds
from vita_audio.engine.graphs import Graphs
from vita_audio.engine.requests import Reason, Tokens
from vita_audio.engine.rounds import Plan, Round, Shapes
from vita_audio.engine.sampling import Drawing
from vita_audio.engine.scheduler import Scheduler, Turn
from vita_audio.engine.state import State
from vita_audio.engine.steps import heads_pass, prompt_pass
from vita_audio.engine.table import RowTable, Running
from vita_audio.engine.weights import Weights
from vita_audio.models.schedule import Schedule

LARGEST_LAG = 64
"""Positions that heads may lag behind the backbone before a pass of their own brings them up."""


class Turns:
    """Runs what the scheduler decides.

    Args:
        weights, state, table: of one engine; a turn changes all but the first.
        scheduler: says how much of a prompt is computed at once.
    """

    def __init__(self, weights: Weights, state: State, table: RowTable, scheduler: Scheduler):
        self._weights, self._state, self._table, self._scheduler = weights, state, table, scheduler
        self._graphs = Graphs(weights.device)
        self._greedy = GreedyRounds(weights, state, table.modes) if weights.backbone_pass else None
        self._last_steps: tuple[int, list[tuple[int, int]]] = (0, [])
        self._shapes = Shapes(weights.num_heads, state.length, exact=weights.device.type == "cpu")

    def compute_prompt(self, row: int) -> None:
        """Compute the next chunk of a prompt, but not its end; heads follow where they know what they read."""
        running = self._table.running[row]
        first = running.seen
        last = min(first + self._chunk(), len(running.tokens) - 1)
        embeds = running.request.embeds
        part = None if embeds is None else embeds[first:last].to(self._weights.embedding, copy=True)
        heads = self._heads_in_use(running)
        prompt_pass(self._weights, self._state, row, first, last, part)
        running.seen = last
        self._catch_up(row, heads, last)

    def run_round(self, turn: Turn) -> list[tuple[Running, Reason]]:
        """Run the first round of rows, or a round of those that have started.

        Returns:
            The requests that ended, and why.
        """
        first, last, rows_in_use = turn.first, turn.last, self._table.running
        members = [
            (row, rows_in_use[row])
            for row in range(first, last)
            if turn.kind == "first" or rows_in_use[row].started
        ]
        for row, running in members:
            running.step = self._next_step(running)
            heads = running.step[1]
            if heads and running.seen - running.seen_heads[heads - 1] > LARGEST_LAG:
                self._catch_up(row, heads, running.seen)
        prompt = self._prompt_end(members[0][1]) if turn.kind == "first" else None
        self._set_steps(first, last, members)
        if self._greedy is not None and all(running.request.sampling.greedy for _, running in members):
            ends: list[tuple[int, Sequence[int]]] = [(0, ())] * (last - first)
            for row, running in members:
                ends[row - first] = running.tokens_left, running.stops
            self._greedy(first, last, prompt, ends, self._table.checks)
        else:
            self._run_in_parts(self._plan(first, last, members, prompt), members, prompt)
        return self._collect(first, last, members)

    def _run_in_parts(
        self, plan: Plan, members: Sequence[tuple[int, Running]], prompt: Tensor | None
    ) -> None:
        self._draw(members)
        table, rows = self._table, plan.rows
        work = Round(
            self._weights,
            self._state,
            plan,
            table.rules.of_rows(rows),
            table.modes.of_rows(rows),
            used=table.used[rows] if table.used is not None and plan.drawing.penalty else None,
            draft_probabilities=table.draft_probabilities[rows]
            if table.draft_probabilities is not None and plan.lossless and not plan.drawing.plain
            else None,
            checks=table.checks.of_rows(rows) if table.checks is not None and plan.check else None,
            prompt=prompt,
        )
        # A recording would read the same prompt again.
        self._graphs.run(self._shapes.key("read", plan) if prompt is None else None, work.read)
        self._graphs.run(self._shapes.key("go_on", plan), work.go_on)

    def _heads_in_use(self, running: Running) -> int:
        if running.draft_length is not None:
            return running.drafts_wanted
        return min(Schedule.parse(running.request.schedule).longest_head_run, self._weights.num_heads)

    def _catch_up(self, row: int, heads: int, seen: int) -> None:
        """Run heads over positions that they lag behind, up to where all tokens that they read are verified."""
        running = self._table.running[row]
        last = min(seen, len(running.tokens) - self._weights.num_heads)
        if not heads or last <= running.seen_heads[heads - 1]:
            return
        chunk = self._chunk()
        for first in range(running.seen_heads[heads - 1], last, chunk):
            heads_pass(self._weights, self._state, row, heads, first, min(first + chunk, last))
        running.seen_heads[:heads] = [last] * heads

    def _set_steps(self, first: int, last: int, members: Sequence[tuple[int, Running]]) -> None:
        """Tell the device who takes part in which passes, unless it is as in the round before."""
        steps = [(0, 0)] * (last - first)
        for row, running in members:
            steps[row - first] = running.step
        if (first, steps) == self._last_steps:
            return
        self._last_steps = (first, steps)
        counts = torch.tensor(steps, device=self._weights.device)
        self._state.backbone_steps[first:last] = counts[:, 0]
        self._state.head_steps[first:last] = counts[:, 1]

    def _next_step(self, running: Running) -> tuple[int, int]:
        if running.draft_length is None:
            return next(running.rounds)
        return 1, running.drafts_wanted

    def _plan(
        self, first: int, last: int, members: Sequence[tuple[int, Running]], prompt: Tensor | None
    ) -> Plan:
        ends, widths, head_widths = [], [], []
        for _, running in members:
            known = len(running.tokens) + running.drafts
            passes, heads = running.step
            seen = known + passes - 1  # at the end of the backbone's passes, if all drafts are accepted
            ends.append(seen)
            widths.append(known - running.seen)
            if heads:
                lag = seen - running.seen_heads[heads - 1]
                # Heads that read a rejected draft compute those positions again.
                head_widths.append(max(lag, heads) if running.drafts else lag)
        requests = [running.request for _, running in members]
        lossless = any(request.lossless for request in requests)
        return Plan(
            first,
            last,
            width=self._shapes.width(max(widths)) if prompt is None else max(widths),
            head_width=self._shapes.head_width(max(head_widths, default=0)),
            length=self._shapes.length(max(ends)),
            backbone_steps=max(running.step[0] for _, running in members),
            head_steps=max(running.step[1] for _, running in members),
            together=len(members) == last - first and len({running.step for _, running in members}) == 1,
            exact=last - first == 1 and not lossless and self._shapes.exact,
            lossless=lossless,
            heads_speak=all(request.audio_rows == "on" for request in requests),
            speech=any(request.audio_rows != "off" for request in requests),
            check=any(request.audio_rows == "auto" and not request.lossless for request in requests),
            drawing=Drawing.of([request.sampling for request in requests]),
        )

    def _prompt_end(self, running: Running) -> Tensor | None:
        """Inputs of the last chunk of a prompt, (width, d), if they are not plain embeddings."""
        embeds = running.request.embeds
        return None if embeds is None else embeds[running.seen :].to(self._weights.embedding, copy=True)

    def _draw(self, members: Sequence[tuple[int, Running]]) -> None:
        """Each member's own random numbers for one round."""
        uniforms = self._state.uniforms
        for row, running in members:
            if running.generator is not None:
                uniforms[row] = torch.rand(
                    uniforms.shape[1], generator=running.generator, dtype=torch.float64
                )

    def _collect(
        self, first: int, last: int, members: Sequence[tuple[int, Running]]
    ) -> list[tuple[Running, Reason]]:
        """Fetch a round's tokens from the device and hand them out. Returns the requests that ended."""
        fetched = self._state.report[first:last].tolist()
        ended: list[tuple[Running, Reason]] = []
        for row, running in members:
            known, drafts, running.seen, *rest = fetched[row - first]
            start, heads = len(running.tokens), self._weights.num_heads
            running.seen_heads, ids = rest[:heads], rest[heads : heads + known - start]
            lossless = running.request.lossless
            accepted = len(ids) - 1 if lossless else None
            if running.draft_length is not None and accepted is not None:
                running.draft_length.update(running.drafts, accepted)
                running.handle.stats.drafts += running.drafts
                running.handle.stats.accepted += accepted
                running.drafts = drafts
            if not running.started:
                running.started = True
            reason = take(running, ids, accepted)
            if reason is not None:
                ended.append((running, reason))
        return ended

    def _chunk(self) -> int:
        return self._scheduler.chunk(self._table.running)


def take(running: Running, ids: list[int], accepted: int | None) -> Reason | None:
    """Add a round's tokens to a reply, up to where it ends. Returns why it ended, or None."""
    stats, left = running.handle.stats, running.tokens_left
    reason: Reason | None = None
    if len(ids) >= left:
        ids, reason = ids[:left], "length"
    stop = next((i for i, token in enumerate(ids) if token in running.stops), None)
    if stop is not None:
        ids, reason = ids[: stop + 1], "stop"
    running.tokens += ids
    stats.new_tokens += len(ids)
    stats.rounds += 1
    if stats.first_seconds is None:
        stats.first_seconds = time.perf_counter() - running.handle.submitted
    running.handle.push(Tokens(tuple(ids), accepted))
    return reason
