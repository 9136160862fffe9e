"""The paper's analysis of speech and text (arXiv 2505.03739, Figure 1), for any checkpoint.

The paper shows three things, and so does this module:

* the attention of speech tokens on text tokens, averaged over heads and layers, follows the text (Figure 1 a);
* with the text hidden but for what matches, the speech is still right; with all text hidden it is not (Figure 1 b).
  Here the difference is a word error rate;
* hence a text token's hidden state holds its speech, which lets small heads predict it (section 3.2). Here: how often
  the states of the backbone and of each head tell the coming speech tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vita_audio.chat import ChatTokens, Example, prompts, split_reply
from vita_audio.constants import IGNORE_INDEX
from vita_audio.evaluation.evaluate import summarise, write_utterances
from vita_audio.evaluation.items import BenchmarkItem, file_name
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.listening import Listener
from vita_audio.evaluation.tasks import SpeechSynthesis
from vita_audio.inference import SpeechPipeline
from vita_audio.inference.observation import Spoken, Visible, head_states, speak

VISIBLE: tuple[Visible, ...] = get_args(Visible)
_LONGER = 2
"""How many times longer a reply with hidden text may be."""
RIDGE = 1e-2
"""Weight of the penalty of a linear map, as a share of the mean square of its inputs."""


@dataclass(frozen=True)
class AttentionMap:
    """Attention of the speech of one reply on the text that it speaks.

    Attributes:
        id: of the item.
        text: the text tokens, as text.
        weights: (speech, text), averaged over heads and layers.
    """

    id: str
    text: list[str]
    weights: Tensor


@dataclass(frozen=True)
class Knowledge:
    """How often a state tells a coming speech token.

    Attributes:
        accuracy: (1 + heads, distances) fractions. Row 0 is the backbone. Distance 1 is the next token that the state
            has not read, told by the LM head itself; the others are told by the best linear map to the state from
            which the backbone tells them, fitted on the other half of the documents.
        positions: speech tokens that were told, per row.
    """

    accuracy: Tensor
    positions: list[int]


def hide_text(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    listener: Listener,
    folder: Path,
    *,
    batch_size: int = 16,
    neighbours: int = 1,
    max_new_tokens: int = 1024,
) -> tuple[dict[str, dict[str, Any]], list[AttentionMap]]:
    """Let the model speak with all, matching and no text visible to its speech, and have it heard.

    Returns:
        For each of :data:`VISIBLE` the word error rate of the speech (against the text to be read, or the text of
        the reply) with its interval; and the attention maps of the replies with all text visible.
    """
    scores: dict[str, dict[str, Any]] = {}
    maps: list[AttentionMap] = []
    written: list[Spoken] = []
    for visible in VISIBLE:
        replies: list[Spoken] = []
        for start in range(0, len(items), batch_size):
            batch = slice(start, start + batch_size)
            earlier = written[batch] or None
            longest = max_new_tokens if earlier is None else _LONGER * max(len(one.ids) for one in earlier)
            replies += speak(
                pipeline, [item.conversation for item in items[batch]], visible, written=earlier,
                neighbours=neighbours, max_new_tokens=longest,
            )  # fmt: skip
        if visible == "all":
            written = replies
            maps = [
                AttentionMap(
                    item.id, [str(pipeline.tokenizer.decode([token])) for token in one.text], one.attention
                )
                for item, one in zip(items, replies, strict=True)
            ]
        started = []
        for item, reply in zip(items, replies, strict=True):
            text, codes = split_reply(reply.ids, pipeline.tokenizer)
            wanted = prompts.requested_text(item.conversation.messages[-1]) or text
            wav = Path("wav") / visible / f"{file_name(item.id)}.wav"
            heard = listener.hear(codes, folder / wav) if codes else None
            utterance = Utterance(item.id, wanted, text, wav=wav.as_posix() if codes else None)
            started.append((utterance, heard))
        utterances = [one if heard is None else replace(one, heard=heard.result()) for one, heard in started]
        write_utterances(folder / f"{visible}.jsonl", SpeechSynthesis(), utterances)
        found = summarise(SpeechSynthesis(), [utterances])
        scores[visible] = {
            "wer": found["tts_wer"],
            "interval": found["intervals"].get("tts_wer"),
            "utterances": len(utterances),
            "without_audio": found["tts_without_audio"],
        }
    return scores, maps


def summarise_attention(maps: Sequence[AttentionMap]) -> dict[str, float | int | None]:
    """How much of the attention goes to text, how focused it is, and whether it follows the text.

    Returns:
        ``on_text``: the share of all attention that goes to the text; ``on_matching``: the share of that which goes to
        the token with most attention and its neighbours; ``even``: what the latter would be if attention were even;
        ``order``: correlation of the place in the speech and the place in the text, median over replies.
    """

    on_text, focused, even, order = [], [], [], []
    for one in maps:
        if not one.weights.numel():
            continue
        total = one.weights.sum(dim=1)
        best = one.weights.argmax(dim=1)
        near = (torch.arange(len(one.text)) - best[:, None]).abs() <= 1
        on_text += total.tolist()
        focused += ((one.weights * near).sum(dim=1) / total.clamp(min=1e-9)).tolist()
        even += near.float().mean(dim=1).tolist()
        if len(best.unique()) > 1:
            order.append(float(np.corrcoef(np.arange(len(best)), best.numpy())[0, 1]))
    if not on_text:
        return {"on_text": None, "on_matching": None, "even": None, "order": None, "speech_tokens": 0}
    return {
        "on_text": float(np.mean(on_text)),
        "on_matching": float(np.mean(focused)),
        "even": float(np.mean(even)),
        "order": float(np.median(order)) if order else None,
        "speech_tokens": len(on_text),
    }


@torch.inference_mode()
def knowledge(pipeline: SpeechPipeline, documents: Sequence[Example], distances: int = 10) -> Knowledge:
    """What the states of backbone and heads know of the coming speech, on documents with replies.

    Raises:
        ValueError: fewer than two documents, or no speech far enough from their end.
    """
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} documents; the accuracy of states needs two at least")
    read = [_Document.of(pipeline, document) for document in documents]
    rows, counts = [], []
    for head in range(len(read[0].states)):
        fitted, scored = _gather(read[::2], head, distances), _gather(read[1::2], head, distances)
        if not len(fitted.inputs) or not len(scored.inputs):
            raise ValueError(f"no speech is {head + distances} tokens before the end of a document")
        rows.append(_accuracies(pipeline, fitted, scored, distances))
        counts.append(len(scored.inputs))
    return Knowledge(torch.tensor(rows), counts)


@dataclass(frozen=True)
class _Document:
    """Ids (time,), their supervised speech (time,) bool, and states (1 + heads, time, d)."""

    ids: Tensor
    speech: Tensor
    states: Tensor

    @classmethod
    def of(cls, pipeline: SpeechPipeline, example: Example) -> _Document:
        tokens = ChatTokens.of(pipeline.tokenizer)
        ids, labels = torch.tensor(example.input_ids), torch.tensor(example.labels)
        is_code = (ids >= tokens.first_code) & (ids < tokens.first_code + tokens.codebook_size)
        speech = is_code & (labels != IGNORE_INDEX)
        return cls(ids, speech, head_states(pipeline, example).float().cpu())


@dataclass(frozen=True)
class _Pairs:
    """States of one head (positions, d) before speech, and for each distance the token and the backbone's state.

    ``targets`` and ``told``: (positions, distances); ``goals``: (positions, distances, d).
    """

    inputs: Tensor
    targets: Tensor
    told: Tensor
    goals: Tensor


def _gather(documents: Sequence[_Document], head: int, distances: int) -> _Pairs:
    """The positions of one head whose next unread token is speech and that are followed by enough tokens."""
    inputs, targets, told, goals = [], [], [], []
    for one in documents:
        last = len(one.ids) - head - distances
        if last <= 0:
            continue
        ahead = torch.arange(last)[:, None] + head + torch.arange(1, distances + 1)
        kept = one.speech[ahead[:, 0]]
        ahead = ahead[kept]
        inputs.append(one.states[head, :last][kept])
        targets.append(one.ids[ahead])
        told.append(one.speech[ahead])
        goals.append(one.states[0][ahead - 1])
    if not inputs:
        empty = torch.zeros(0)
        return _Pairs(empty, empty, empty, empty)
    return _Pairs(*(torch.cat(parts) for parts in (inputs, targets, told, goals)))


def _accuracies(pipeline: SpeechPipeline, fitted: _Pairs, scored: _Pairs, distances: int) -> list[float]:
    model: Any = pipeline.model
    square = fitted.inputs.T.double() @ fitted.inputs.double()
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    found = []
    for distance in range(distances):
        states = scored.inputs
        if distance:
            goal = fitted.inputs.T.double() @ fitted.goals[:, distance].double()
            states = states @ torch.linalg.solve(square, goal).float()
        told = scored.told[:, distance]
        logits = model.lm_head(states[told].to(model.device, model.dtype))
        right = logits.argmax(dim=-1).cpu() == scored.targets[told, distance]
        found.append(float(right.float().mean()) if len(right) else float("nan"))
    return found
