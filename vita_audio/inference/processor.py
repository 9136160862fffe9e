"""A transformers processor for the model's inputs and outputs.

    processor = AutoProcessor.from_pretrained(
        "output/stage4", audio_tokenizer_type="mel_vq", audio_tokenizer_path="output/codec"
    )
    conversation = [{"role": "user", "content": [{"type": "audio", "audio": "question.wav"}]}]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    generated = model.generate(**inputs, max_new_tokens=512)
    text, waveform, rate = processor.decode_speech(generated[0, inputs["input_ids"].shape[1] :])

Prompts are rendered by :mod:`vita_audio.chat`, so they equal those of
:class:`~vita_audio.inference.SpeechPipeline`. Text is never read as control tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import dropwhile, islice
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vita_audio.audio import AudioLike, AudioTokenizer, get_audio_tokenizer
from vita_audio.chat import ChatTokens, Conversation, build_prompt, check_token_id, split_reply
from vita_audio.chat.content import as_clip, read_chatml, read_content, write_chatml
from vita_audio.inference.backend import collate_prompts
from vita_audio.inference.pipeline import check_codec
from vita_audio.models import check_device, open_tokenizer

Messages = Sequence[Mapping[str, Any]] | Conversation
TokenIds = Sequence[int] | np.ndarray | Tensor

_ALWAYS: dict[str, tuple[Any, ...]] = {
    "return_tensors": ("pt", "auto"),
    "padding": (True, "longest"),
    "padding_side": ("left",),
    "truncation": (False, None),
    "max_length": (None,),
    "add_special_tokens": (True, False),  # turn markers are part of the chat regardless of this option
    "return_attention_mask": (True,),
    "sanitize_control_tokens": (True, False),  # always
    "chat_template": (None,),
    "tools": (None, []),
    "documents": (None, []),
    "continue_final_message": (False, None),
    "return_assistant_tokens_mask": (False, None),
    "load_audio_from_video": (False, None),
    "images": (None, []),
    "videos": (None, []),
}
"""Arguments of transformers' processors that are fixed here, and the accepted values."""
_GROUPS = ("text_kwargs", "audio_kwargs", "common_kwargs")


class VitaAudioProcessor(ProcessorMixin):
    """Tokenizer and codec in one object; ``AutoProcessor`` opens it for both families.

    Args:
        tokenizer: the text tokenizer saved with the model.
        audio_tokenizer_type: codec kind, see ``vita_audio.audio.available_kinds()``. If only folders are given,
            GLM-4-Voice, with SenseVoice features if the tokenizer belongs to the Plus family.
        audio_tokenizer_path: see ``get_audio_tokenizer``. With neither a kind nor a folder the processor handles
            only text.
        flow_path: see there.
        frontend_path: see there.
        device: device of the codec; defaults to CUDA if available. Inputs are returned on the CPU.

    Attributes:
        codec: the speech codec; None for text only.

    Raises:
        ValueError: a folder is missing or holds something else, or tokenizer and codec do not match.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        audio_tokenizer_type: str | None = None,
        audio_tokenizer_path: str | PathLike[str] | None = None,
        flow_path: str | PathLike[str] | None = None,
        frontend_path: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(tokenizer)
        tokens = ChatTokens.of(tokenizer)
        folders = {
            "audio_tokenizer_path": audio_tokenizer_path,
            "flow_path": flow_path,
            "frontend_path": frontend_path,
        }
        given = {name: str(Path(folder).absolute()) for name, folder in folders.items() if folder is not None}
        if audio_tokenizer_type is None and given:
            audio_tokenizer_type = "glm4voice" if tokens.context is None else "sensevoice_glm4voice"
        self.codec: AudioTokenizer | None = None
        self._saved = given
        if audio_tokenizer_type is not None:
            self._saved = {"audio_tokenizer_type": audio_tokenizer_type, **given}
            self.codec = get_audio_tokenizer(
                audio_tokenizer_type,
                given.get("audio_tokenizer_path"),
                flow_path=given.get("flow_path"),
                frontend_path=given.get("frontend_path"),
                device=str(check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))),
            )
            check_codec(tokenizer, self.codec)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that have their own files. ProcessorMixin would pick every argument with ``tokenizer`` in its name."""
        return ["tokenizer"]

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the base class lists hub arguments by name
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        audio_tokenizer_type: str | None = None,
        audio_tokenizer_path: str | PathLike[str] | None = None,
        flow_path: str | PathLike[str] | None = None,
        frontend_path: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        **hub: Any,
    ) -> VitaAudioProcessor:
        """Open the tokenizer of a model folder, or a folder written by :meth:`save_pretrained`, and a codec.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            audio_tokenizer_type: see the class; the default is the one saved in processor_config.json.
            audio_tokenizer_path: see the class; the default likewise.
            flow_path: see the class; the default likewise.
            frontend_path: see the class; the default likewise.
            device: see the class.
            hub: as in transformers, such as ``revision`` and ``token``.

        Raises:
            ValueError: see the class; or there is no tokenizer.
        """
        values: dict[str, Any] = {
            "audio_tokenizer_type": audio_tokenizer_type,
            "audio_tokenizer_path": audio_tokenizer_path,
            "flow_path": flow_path,
            "frontend_path": frontend_path,
        }
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        for name, value in values.items():
            kept = saved.get(name)
            if value is not None or kept is None:
                continue
            if name.endswith("_path") and not (isinstance(kept, str) and Path(kept).is_dir()):
                raise ValueError(
                    f"{pretrained_model_name_or_path}: processor_config.json has {name}={kept!r}, not a folder "
                    f"on this machine; give {name}=…"
                )
            values[name] = kept
        if Path(pretrained_model_name_or_path).is_dir():
            tokenizer = open_tokenizer(pretrained_model_name_or_path)
        else:
            tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **hub)
        return cls(tokenizer, **values, device=device)

    def to_dict(self) -> dict[str, Any]:
        """The content of processor_config.json: the codec's kind and its folders' absolute paths."""
        return {"processor_class": type(self).__name__, **self._saved}

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's outputs; the last two are for the Plus family."""
        return ["input_ids", "attention_mask", "audios", "audio_indices"]

    def apply_chat_template(  # type: ignore[override]  # the base class lists arguments that do not apply here
        self,
        conversation: Messages | Sequence[Messages],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        sampling_rate: int | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> BatchFeature | Tensor | str | list[str]:
        """Render one conversation, or a batch of them, unchanged: no system message is added.

        Args:
            conversation: messages of ``{"role", "content"}``, where content is a string or a list of
                ``{"type": "text", "text": …}`` and ``{"type": "audio", "audio" | "path" | "url": …}``; or a
                :class:`~vita_audio.chat.Conversation`, as ``vita_audio.inference.prompts`` makes them. Audios are
                local files or any :data:`~vita_audio.audio.AudioLike`.
            add_generation_prompt: whether to open the assistant's turn at the end.
            tokenize: whether to return token ids instead of ChatML text; the text has an ``<|audio|>`` for each audio
                and can be passed to :meth:`__call__`.
            return_dict: with ``tokenize``: whether to return everything that ``generate`` needs.
            sampling_rate: of audios that are bare arrays, in Hz.
            processor_kwargs: ``sampling_rate`` and similar, as for other processors.
            options: other arguments of transformers' processors, only at the values that this processor implements.

        Returns:
            Text, one for each conversation of a batch; ids of shape (rows, time); or the inputs of
            :meth:`__call__`.

        Raises:
            ValueError: content, audio or option that cannot be used; a :class:`~vita_audio.chat.SampleError` for the
                first two.
        """
        options |= processor_kwargs or {}
        sampling_rate = _check_options(options, sampling_rate)
        given, batch = _listed(conversation)
        conversations = [
            one if isinstance(one, Conversation) else read_content(one, sampling_rate) for one in given
        ]
        if not tokenize:
            texts = [write_chatml(one, add_generation_prompt) for one in conversations]
            return texts if batch else texts[0]
        inputs = self._inputs([(one, add_generation_prompt) for one in conversations])
        return inputs if return_dict else inputs["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        audio: AudioLike | Sequence[AudioLike] | Sequence[Sequence[AudioLike]] | None = None,
        *,
        sampling_rate: int | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Inputs of ``model.generate`` for one text or a batch of texts.

        Args:
            text: a user message, or a conversation written by :meth:`apply_chat_template`; each ``<|audio|>`` in
                it represents an audio.
            audio: an audio, a list of them in the order of the tags over all texts, or one list for each text.
            sampling_rate: of audios that are bare arrays, in Hz.
            options: see :meth:`apply_chat_template`.

        Returns:
            ``input_ids`` and ``attention_mask``, (rows, time), padded on the left; for speech in the Plus family
            also ``audios`` and ``audio_indices``, see :func:`~vita_audio.inference.backend.collate_prompts`.

        Raises:
            ValueError: see :meth:`apply_chat_template`; or the numbers of audios and tags differ.
        """
        sampling_rate = _check_options(options, sampling_rate)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text: give a string or a list of strings; messages go to apply_chat_template")
        read = [read_chatml(one) for one in texts]
        tags = [sum(message.num_audios for message in messages) for messages, _ in read]
        dealt = _deal(audio, tags)
        return self._inputs(
            [
                (Conversation(messages, tuple(as_clip(clip, sampling_rate) for clip in clips)), opens)
                for (messages, opens), clips in zip(read, dealt, strict=True)
            ]
        )

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> Any:
        """Text of one sequence, or a list of texts for a batch.

        Args:
            token_ids: generated ids.
            skip_special_tokens: omit special tokens and speech codes, which leaves the text of a reply;
                otherwise decode everything as the tokenizer does.
            options: options of the tokenizer.

        Raises:
            ValueError: an id is negative, such as -100 in labels.
        """
        ids = _to_list(token_ids)
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, **options) for row in ids]
        for token in ids:
            check_token_id(token)
        return (
            split_reply(ids, self.tokenizer)[0]
            if skip_special_tokens
            else self.tokenizer.decode(ids, **options)
        )

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """Texts of several sequences; see :meth:`decode`."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]

    def split(self, token_ids: TokenIds) -> tuple[str, list[int]]:
        """Text and speech codes of one reply.

        Args:
            token_ids: (time,), the generated ids, without the prompt.

        Raises:
            ValueError: the ids are a batch, include the prompt, whose speech is not part of the reply, or
                include a negative number.
        """
        ids = _to_list(token_ids)
        if ids and isinstance(ids[0], list):
            raise ValueError(f"got a batch of {len(ids)} replies; give one row at a time")
        tokens = ChatTokens.of(self.tokenizer)
        unpadded = list(dropwhile(lambda token: token == tokens.pad, ids))
        if any(unpadded[: len(opening)] == opening for opening in tokens.turn_openings.values()):
            raise ValueError(
                "the ids begin with the prompt; give generated[row, inputs['input_ids'].shape[1]:]"
            )
        return split_reply(ids, self.tokenizer)

    def decode_speech(self, token_ids: TokenIds) -> tuple[str, Tensor | None, int]:
        """The text and sound of one reply.

        Args:
            token_ids: see :meth:`split`.

        Returns:
            Text; samples of shape (samples,), None if the reply has no speech; their rate in Hz.

        Raises:
            ValueError: see :meth:`split`; or the processor has no codec, or one that only encodes.
        """
        codec = self._needed_codec()
        text, codes = self.split(token_ids)
        return text, codec.decode(codes) if codes else None, codec.sample_rate

    def _inputs(self, conversations: Sequence[tuple[Conversation, bool]]) -> BatchFeature:
        """The conversations of the batch, each with a flag for an open assistant turn."""
        if any(conversation.audios for conversation, _ in conversations):
            self._needed_codec()
        prompts = [
            build_prompt(one.messages, one.audios, self.tokenizer, self.codec, opens)
            for one, opens in conversations
        ]
        batch = collate_prompts(prompts, ChatTokens.of(self.tokenizer).pad, torch.device("cpu"))
        return BatchFeature({"input_ids": batch.pop("inputs"), **batch})

    def _needed_codec(self) -> AudioTokenizer:
        if self.codec is None:
            raise ValueError(
                "the processor has no codec; give AutoProcessor.from_pretrained an audio_tokenizer_type and its folders"
            )
        return self.codec


def _check_options(options: Mapping[str, Any], sampling_rate: int | None) -> int | None:
    """Refuse options with unsupported values. Returns the sampling rate they state."""
    for name, value in options.items():
        if name in _GROUPS:
            sampling_rate = _check_options(value, sampling_rate)
        elif name == "sampling_rate":
            sampling_rate = value
        elif name not in _ALWAYS:
            raise TypeError(f"{name}: this processor has no such argument")
        elif not any(value is one or value == one for one in _ALWAYS[name]):
            choices = " or ".join(repr(one) for one in _ALWAYS[name])
            raise ValueError(
                f"{name}={value!r}: this processor always behaves as with {choices}; omit the argument"
            )
    return sampling_rate


def _listed(conversation: Any) -> tuple[list[Messages], bool]:
    """The conversations, and whether they were given as a batch."""
    batch = (
        isinstance(conversation, (list, tuple))
        and len(conversation) > 0
        and isinstance(conversation[0], (list, tuple, Conversation))
    )
    return list(conversation) if batch else [conversation], batch


def _deal(audio: Any, tags: Sequence[int]) -> list[list[Any]]:
    """The audios of each text, one per tag; extra audios go to the last text."""
    audios = [] if audio is None else audio if isinstance(audio, list) else [audio]
    if audios and all(isinstance(one, list) for one in audios):
        if len(audios) != len(tags):
            raise ValueError(f"audio: {len(audios)} lists for {len(tags)} texts; give one list for each text")
        return audios
    remaining = iter(audios)
    dealt = [list(islice(remaining, count)) for count in tags]
    dealt[-1] += remaining
    return dealt


def _to_list(token_ids: Any) -> list[Any]:
    """Ids as Python lists, nested for a batch."""
    if isinstance(token_ids, Tensor | np.ndarray):
        nested: list[Any] = token_ids.tolist()
        return nested if token_ids.ndim else [nested]
    if isinstance(token_ids, Integral):
        return [token_ids]
    return [_to_list(one) if isinstance(one, (list, tuple, Tensor, np.ndarray)) else one for one in token_ids]
