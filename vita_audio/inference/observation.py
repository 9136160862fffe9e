"""What a model attends to while it speaks, what it says when text is hidden from it, and the states of its heads.

These passes serve the paper's analysis (arXiv 2505.03739, Figure 1), not generation. They run the backbone alone and
greedily, with eager attention, which returns its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vita_audio.chat import ChatTokens, Conversation, Example, encode_text, prompts
from vita_audio.constants import TTS_PROMPT
from vita_audio.inference.backend import collate_prompts
from vita_audio.inference.pipeline import SpeechPipeline
from vita_audio.models.compat import attention_implementation

Visible = Literal["all", "matching", "none"]
"""The text that speech may attend to: all of it, the tokens that it attends to most, or none."""


@dataclass(frozen=True)
class Spoken:
    """A reply, and what its speech attended to.

    Attributes:
        ids: (reply,) token ids, without the one that ended it.
        text: (text,) ids of the text that is spoken: the reply's own, or the requested text if that is longer.
        attention: (speech, text), for each position whose next token is speech its attention to that text with nothing
            hidden, averaged over the heads and layers of the backbone. A text token that the prompt requests and the
            reply repeats counts once, with the attention to both places.
    """

    ids: list[int]
    text: list[int]
    attention: Tensor


@torch.inference_mode()
def speak(
    pipeline: SpeechPipeline,
    conversations: Sequence[Conversation],
    visible: Visible = "all",
    *,
    written: Sequence[Spoken] | None = None,
    neighbours: int = 1,
    max_new_tokens: int = 1024,
) -> list[Spoken]:
    """Answer in one batch while hiding text from the positions that predict speech.

    Hidden from them are the requested text and the reply's own, in all layers. The template and the markers of speech,
    which have read the text, stay visible, as in the paper.

    Args:
        visible: ``matching`` shows, at each step, the text token that would get most attention if nothing were
            hidden, with ``neighbours`` tokens of text on both sides.
        written: earlier replies whose text is kept, so that only the speech is generated; None: text is generated too.

    Raises:
        ValueError: the model's attention is not eager, or has a sliding window.
    """
    _check(pipeline.model)
    row = _Rows(pipeline, conversations, written)
    hidden = row.prefill()
    for _ in range(max_new_tokens):
        speaks = row.append(row.choose(pipeline.model.lm_head(hidden[:, -1])))
        if bool(row.ended.all()):
            break
        hiding = row.text & speaks[:, None]
        if visible != "none":
            hidden, weights = row.advance(row.known)
            row.note(weights, speaks)
            if visible == "all" or not bool(speaks.any()):
                continue
            row.step_back()
            hiding &= ~row.nearest(weights, neighbours)
        hidden, _ = row.advance(row.known & ~hiding)
    return row.spoken()


@torch.inference_mode()
def head_states(pipeline: SpeechPipeline, example: Example) -> Tensor:
    """States of the backbone and of every head over one document, given its own tokens as in training.

    Returns:
        (1 + heads, time, d): h^0, h^1, …. State k at position t has read the tokens up to t + k.

    Raises:
        ValueError: see :func:`speak`.
    """
    model: Any = pipeline.model
    _check(model)
    ids, embeds, _ = _embedded(pipeline, [example])
    time = ids.shape[1]
    positions = torch.arange(time, device=ids.device)[None]
    masks = _masks(model, torch.ones(time, time, dtype=torch.bool, device=ids.device).tril()[None])
    hidden = model.model(inputs_embeds=embeds, attention_mask=masks, position_ids=positions).last_hidden_state
    return torch.cat([hidden, *model.head_states(ids, hidden, positions, masks)])


class _Rows:
    """A batch of replies in the making, padded on the left; all masks are (rows, time) bool over keys.

    Attributes:
        known: positions that hold a token.
        place: (rows, time), for the text that is spoken its place in that text, 1, 2, …; 0 elsewhere.
        ended: (rows,) replies that are complete.
    """

    def __init__(
        self,
        pipeline: SpeechPipeline,
        conversations: Sequence[Conversation],
        written: Sequence[Spoken] | None,
    ) -> None:
        self.model: Any = pipeline.model
        self.tokens = ChatTokens.of(pipeline.tokenizer)
        self.examples = [pipeline.prompt(conversation) for conversation in conversations]
        self.ids, self.embeds, padding = _embedded(pipeline, self.examples)
        self.known = padding.bool()
        self.place = torch.zeros_like(self.ids)
        self.said = torch.zeros(len(self.ids), dtype=torch.long, device=self.ids.device)
        for row, (example, conversation) in enumerate(zip(self.examples, conversations, strict=True)):
            requested = _requested(pipeline, example, conversation)
            if requested:
                start = self.ids.shape[1] - len(example)
                places = torch.arange(1, len(requested) + 1, device=self.ids.device)
                self.place[row, start + requested.start : start + requested.stop] = places
        self.ended = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        self._script = None if written is None else [self._outside_speech(reply.ids) for reply in written]
        self._cache = DynamicCache()
        self._notes: list[list[Tensor]] = [[] for _ in self.examples]

    @property
    def text(self) -> Tensor:
        """The text that is spoken."""
        return self.place > 0

    def prefill(self) -> Tensor:
        """Run the prompts; returns the hidden states (rows, time, d)."""
        time = self.ids.shape[1]
        causal = torch.ones(time, time, dtype=torch.bool, device=self.ids.device).tril()
        positions = (self.known.cumsum(dim=1) - 1).clamp(min=0)
        output: Any = self.model.model(
            inputs_embeds=self.embeds,
            attention_mask=_masks(self.model, causal & self.known[:, None]),
            position_ids=positions,
            cache=self._cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, (rows,), from logits (rows, vocabulary); outside speech from the script."""
        if self._script is None:
            return logits.argmax(dim=-1)
        first, stop = self.tokens.first_code, self.tokens.first_code + self.tokens.codebook_size
        speech = torch.full_like(logits, -torch.inf)
        for allowed in (slice(first, stop), slice(self.tokens.end, self.tokens.end + 1)):
            speech[:, allowed] = logits[:, allowed]
        chosen = speech.argmax(dim=-1)
        for row in (~self._speaks(self.ids[:, -1])).nonzero().flatten().tolist():
            left = self._script[row]
            chosen[row] = left.pop(0) if left else self.tokens.stops[0]
        return chosen

    def append(self, new: Tensor) -> Tensor:
        """Add one token to each row, (rows,); returns which rows speak next, (rows,) bool."""
        self.ended = self.ended | torch.isin(new, torch.tensor(self.tokens.stops, device=new.device))
        new = new.where(~self.ended, self.tokens.pad)
        speaks = self._speaks(new)
        is_text = ~speaks & ~self.ended & (new != self.tokens.end)
        self.said += is_text
        self.ids = torch.cat([self.ids, new[:, None]], dim=1)
        self.known = torch.cat([self.known, ~self.ended[:, None]], dim=1)
        self.place = torch.cat([self.place, self.said.where(is_text, 0)[:, None]], dim=1)
        return speaks

    def _speaks(self, last: Tensor) -> Tensor:
        """Whether speech may follow a token: it is a code or the marker that begins speech."""
        first = self.tokens.first_code
        is_code = (last >= first) & (last < first + self.tokens.codebook_size)
        return is_code | (last == self.tokens.begin)

    def _outside_speech(self, ids: Sequence[int]) -> list[int]:
        """The text of a reply and the markers that begin its speech."""
        first, stop = self.tokens.first_code, self.tokens.first_code + self.tokens.codebook_size
        return [token for token in ids if token != self.tokens.end and not first <= token < stop]

    def advance(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Run the last token of each row, which attends to ``keys`` (rows, time).

        Returns:
            The hidden states (rows, 1, d), and the attention (rows, time) averaged over heads and layers.
        """
        output = self.model.model(
            input_ids=self.ids[:, -1:],
            attention_mask=_masks(self.model, keys[:, None]),
            position_ids=(self.known.sum(dim=1, keepdim=True) - 1).clamp(min=0),
            cache=self._cache,
            use_cache=True,
            output_attentions=True,
        )
        weights = torch.stack([layer[:, :, -1].mean(dim=1) for layer in output.attentions]).mean(dim=0)
        return output.last_hidden_state, weights.float()

    def step_back(self) -> None:
        """Forget the last token's keys and values, so that it can be run again."""
        self._cache.crop(-1)

    def note(self, weights: Tensor, speaks: Tensor) -> None:
        """Keep the attention of the rows that speak to each place of the text."""
        folded = self._by_place(weights)
        for row in (speaks & ~self.ended).nonzero().flatten().tolist():
            self._notes[row].append(folded[row].cpu())

    def nearest(self, weights: Tensor, neighbours: int) -> Tensor:
        """The text token with most attention and its neighbours in the text, (rows, time) bool."""
        best = self._by_place(weights).argmax(dim=1, keepdim=True) + 1
        return self.text & ((self.place - best).abs() <= neighbours)

    def _by_place(self, weights: Tensor) -> Tensor:
        """Attention (rows, time) summed over equal places, (rows, places)."""
        places = int(self.place.max()) + 1
        folded = weights.new_zeros(len(weights), max(places, 2))
        return folded.scatter_add_(1, self.place, weights)[:, 1:]

    def spoken(self) -> list[Spoken]:
        """The replies so far."""
        found = []
        for row, example in enumerate(self.examples):
            start = int(self.known[row].int().argmax())
            stop = start + int(self.known[row].sum())
            length = int(self.place[row].max())
            # Of both copies of a requested token, the later one is the reply's.
            text = {
                int(place): int(token)
                for place, token in zip(self.place[row], self.ids[row], strict=True)
                if place
            }
            notes = [torch.nn.functional.pad(note, (0, length))[:length] for note in self._notes[row]]
            found.append(
                Spoken(
                    ids=self.ids[row, start + len(example) : stop].tolist(),
                    text=[text[place] for place in range(1, length + 1)],
                    attention=torch.stack(notes) if notes else torch.zeros(0, length),
                )
            )
        return found


def _requested(pipeline: SpeechPipeline, example: Example, conversation: Conversation) -> range:
    """The places in a prompt of the text that it asks to be read aloud; empty for other prompts."""
    question = conversation.messages[-1]
    if not prompts.requested_text(question):
        return range(0)
    tokens = ChatTokens.of(pipeline.tokenizer)
    said = encode_text(pipeline.tokenizer, question.texts[-1])
    instruction = encode_text(pipeline.tokenizer, f"{TTS_PROMPT}\n")
    shared = next(
        (place for place, (one, other) in enumerate(zip(said, instruction, strict=False)) if one != other),
        min(len(said), len(instruction)),
    )
    stop = len(example) - len(tokens.turn_end) - len(tokens.turn_openings["assistant"])
    return range(stop - len(said) + shared, stop)


def _embedded(pipeline: SpeechPipeline, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and padding (rows, time), and the backbone's inputs (rows, time, d)."""
    model: Any = pipeline.model
    batch = collate_prompts(examples, ChatTokens.of(pipeline.tokenizer).pad, model.device)
    ids, padding = batch.pop("inputs"), batch.pop("attention_mask")
    return ids, model.embed_inputs(ids, **batch), padding


def _masks(model: Any, visible: Tensor) -> dict[str, object]:
    """Ready masks of eager attention from (rows, queries, keys) bool."""
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device).masked_fill(~visible, lowest)
    return dict.fromkeys(set(model.config.layer_types), mask[:, None])


def _check(model: Any) -> None:
    found = attention_implementation(model.config)
    if found != "eager":
        raise ValueError(f"attention {found!r} returns no weights; open the model with eager attention")
    if "sliding_attention" in model.config.layer_types:
        raise ValueError("the model has layers with a sliding window, which this analysis does not support")
