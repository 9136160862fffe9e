"""A model that listens and talks: checkpoint, tokenizer and codec behind one object.

    pipeline = SpeechPipeline.from_pretrained("output/stage4", "mel_vq", "output/codec")
    reply = pipeline.speech_to_speech("question.wav")
    save_audio("answer.wav", reply.waveform, reply.sample_rate)

    for event in pipeline.stream(prompts.synthesis("good morning")):
        ...                                   # TextDelta, AudioChunk, and at the end the Reply

Only the reply's own codes reach the decoder: neither the question nor a voice prompt is heard
again in the answer (bug 5 of the data specification).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from vita_audio.audio import AudioLike, AudioTokenizer, get_audio_tokenizer
from vita_audio.chat import ChatTokens, Conversation, Example, build_prompt, prompts
from vita_audio.inference.backend import Event, ReferenceBackend, Reply, Request, Sound, collect
from vita_audio.inference.options import CHECKPOINT_OPTIONS, GenerationOptions
from vita_audio.models import Qwen2MTPConfig, check_device, open_config, open_model, open_tokenizer


class SpeechPipeline:
    """Text and speech in, text and speech out.

    Args:
        model: any causal LM of the family, on its device.
        tokenizer: the text tokenizer saved with it, audio tokens included.
        codec: turns speech into what the model reads, and codes into sound.

    Raises:
        ValueError: model, tokenizer and codec do not belong together.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer):
        check_fit(model.config, tokenizer, codec)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.codec = codec
        self.backend = ReferenceBackend(self.model, tokenizer, codec)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | PathLike[str],
        audio_tokenizer_type: str = "glm4voice",
        audio_tokenizer_path: str | PathLike[str] | None = None,
        flow_path: str | PathLike[str] | None = None,
        frontend_path: str | PathLike[str] | None = None,
        *,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
    ) -> SpeechPipeline:
        """Load a checkpoint, its tokenizer and a codec.

        Args:
            model_dir: folder of a ``qwen2_mtp`` or ``qwen2_mtp_sensevoice`` checkpoint, its name in the local
                Hugging Face cache, or ``hf://owner/name`` to download it.
            audio_tokenizer_type: codec kind, see ``vita_audio.audio.available_kinds()``.
            audio_tokenizer_path, flow_path, frontend_path: see ``get_audio_tokenizer``.
            device: defaults to CUDA where there is one.
            dtype: of the model; ``"auto"`` is the checkpoint's own.

        Raises:
            ValueError: a folder or file is missing or damaged, the three do not belong together, or there is no
                such device.
        """
        device = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = open_config(model_dir)
        tokenizer = open_tokenizer(model_dir)
        codec = get_audio_tokenizer(
            audio_tokenizer_type,
            audio_tokenizer_path,
            flow_path=flow_path,
            frontend_path=frontend_path,
            device=str(device),
        )
        # Before gigabytes are read.
        check_fit(config, tokenizer, codec)
        model = open_model(model_dir, dtype=dtype, attn_implementation=attn_implementation, device=device)
        return cls(model, tokenizer, codec)

    def chat(
        self, text: str, system: str | None = None, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Reply:
        """Answer a typed question."""
        return self.reply(prompts.chat(text, system), options)

    def speech_to_speech(
        self,
        audio: AudioLike,
        text: str = "",
        system: str | None = None,
        voice: AudioLike | None = None,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
    ) -> Reply:
        """Answer a spoken question, in the voice of ``voice`` if given."""
        return self.reply(prompts.speech_to_speech(audio, text, system, voice), options)

    def transcribe(self, audio: AudioLike, options: GenerationOptions = CHECKPOINT_OPTIONS) -> Reply:
        """Write speech down (ASR)."""
        return self.reply(prompts.transcription(audio), options)

    def synthesize(
        self, text: str, voice: AudioLike | None = None, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Reply:
        """Read text aloud (TTS), in the voice of ``voice`` if given (voice cloning)."""
        return self.reply(prompts.synthesis(text, voice), options)

    def prompt(self, conversation: Conversation) -> Example:
        """Token ids (and features) of a conversation, ending where the reply begins."""
        return build_prompt(conversation.messages, conversation.audios, self.tokenizer, self.codec)

    def request(
        self,
        conversation: Conversation,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
        sound: Sound = "streamed",
    ) -> Request:
        """A conversation made ready for the backend; its clock starts now."""
        asked = time.perf_counter()
        return Request(self.prompt(conversation), options, sound, asked)

    def stream(
        self, conversation: Conversation, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Generator[Event, None, None]:
        """Answer one conversation while it is generated: text and sound as they exist, then the reply.

        Closing the iterator ends generation at once.
        """
        with closing(self.backend.stream(self.request(conversation, options))) as events:
            for event in events:
                if isinstance(event, Reply):
                    event = replace(event, system=_system_of(conversation))
                yield event

    def reply(
        self,
        conversation: Conversation,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
        *,
        decode: bool = True,
    ) -> Reply:
        """Answer one conversation; ``decode=False`` leaves the speech as codes."""
        return self.reply_batch([conversation], options, decode=decode)[0]

    def reply_batch(
        self,
        conversations: Sequence[Conversation],
        options: GenerationOptions = CHECKPOINT_OPTIONS,
        *,
        decode: bool = True,
    ) -> list[Reply]:
        """Answer several conversations in one batch; greedy replies equal those given one by one."""
        sound: Sound = "whole" if decode else "none"
        requests = [self.request(conversation, options, sound) for conversation in conversations]
        replies = collect(self.backend.stream_many(requests), len(requests))
        return [
            replace(reply, system=_system_of(conversation))
            for conversation, reply in zip(conversations, replies, strict=True)
        ]


def _system_of(conversation: Conversation) -> str | None:
    first = conversation.messages[0]
    return first.content if first.role == "system" else None


def check_fit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer) -> None:
    """Whether model, tokenizer and codec belong together.

    Raises:
        ValueError: they do not; the message says what to give instead.
    """
    if not isinstance(config, Qwen2MTPConfig):
        raise ValueError(
            f"the checkpoint is a plain {config.model_type}; give one that training has saved (qwen2_mtp)"
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {config.vocab_size}; "
            "give the tokenizer saved with the model"
        )
    if codec.continuous_input != config.continuous_input:
        raise ValueError(_other_family(f"a {config.model_type} model", codec, config.continuous_input))
    check_codec(tokenizer, codec)


def check_codec(tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer) -> None:
    """Whether tokenizer and codec belong together.

    Raises:
        ValueError: they do not; the message says what to give instead.
    """
    tokens = ChatTokens.of(tokenizer)
    if tokens.codebook_size != codec.codebook_size:
        raise ValueError(
            f"the tokenizer has {tokens.codebook_size} speech tokens, the {codec.kind} codec {codec.codebook_size} "
            "codes; give the codec the model was trained with"
        )
    continuous_input = tokens.context is not None
    if codec.continuous_input != continuous_input:
        raise ValueError(_other_family("a model with this tokenizer", codec, continuous_input))


def _other_family(model: str, codec: AudioTokenizer, continuous_input: bool) -> str:
    kind = codec.kind.removeprefix("sensevoice_")
    fitting = f"sensevoice_{kind}" if continuous_input else kind
    return f"{model} does not read the {codec.kind} codec; give --audio_tokenizer_type {fitting}"
