"""The speech pipeline: checkpoint, tokenizer and codec in one object.

    pipeline = SpeechPipeline.from_pretrained("output/stage4", "mel_vq", "output/codec")
    reply = pipeline.speech_to_speech("question.wav")
    save_audio("answer.wav", reply.waveform, reply.sample_rate)

    for event in pipeline.stream(prompts.synthesis("good morning")):
        ...                                   # TextDelta, AudioChunk, and at the end the Reply

Only the reply's own codes are decoded: the answer repeats neither the question nor a voice prompt
(bug 5 of the data specification).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from vita_audio import models
from vita_audio.audio import AudioLike, AudioTokenizer, get_audio_tokenizer, is_continuous_kind
from vita_audio.chat import ChatTokens, Conversation, Example, build_prompt, prompts
from vita_audio.distributed import local_rank
from vita_audio.engine import Quantization, can_run
from vita_audio.inference.backend import Backend, ReferenceBackend, collect
from vita_audio.inference.engine_backend import EngineBackend
from vita_audio.inference.options import (
    AUTO_SYSTEM,
    CHECKPOINT_OPTIONS,
    CodecOptions,
    GenerationOptions,
    RuntimeOptions,
    system_message,
)
from vita_audio.inference.replies import Event, Reply, Request, Sound
from vita_audio.inference.session import ChatSession
from vita_audio.models.configuration import Qwen2MTPConfig

if TYPE_CHECKING:
    from vita_audio.models import Qwen2MTPForCausalLM


class SpeechPipeline:
    """Text and speech in, text and speech out.

    Args:
        model: any causal LM of the family, on its device.
        tokenizer: the text tokenizer saved with it, audio tokens included.
        codec: turns speech into the model's input, and codes into sound.
        engine: see :class:`~vita_audio.inference.options.RuntimeOptions`.
        quantization: see there. With it the engine empties the model's matrices; ``model.generate`` no longer works.

    Raises:
        ValueError: model, tokenizer and codec do not match, or the engine cannot run the model but must.
    """

    def __init__(
        self,
        model: Qwen2MTPForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        codec: AudioTokenizer,
        engine: bool | None = RuntimeOptions.engine,
        quantization: Quantization = RuntimeOptions.quantization,
    ):
        check_fit(model.config, tokenizer, codec)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.codec = codec
        self.backend: Backend
        if engine or quantization != "none" or (engine is None and can_run(model)):
            self.backend = EngineBackend(self.model, tokenizer, codec, quantization=quantization)
        else:
            self.backend = ReferenceBackend(self.model, tokenizer, codec)

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | PathLike[str],
        audio_tokenizer_type: str = CodecOptions.audio_tokenizer_type,
        audio_tokenizer_path: str | PathLike[str] | None = None,
        flow_path: str | PathLike[str] | None = None,
        frontend_path: str | PathLike[str] | None = None,
        *,
        device: str | None = None,
        dtype: str | torch.dtype = RuntimeOptions.dtype,
        attn_implementation: str | None = None,
    ) -> SpeechPipeline:
        """Load a checkpoint, its tokenizer and a codec; see :meth:`open`.

        Args:
            model_dir: folder of a ``qwen2_mtp`` or ``qwen2_mtp_sensevoice`` checkpoint, or a name that
                :func:`~vita_audio.models.open.open_model` accepts.
            audio_tokenizer_type: see :class:`~vita_audio.inference.options.CodecOptions`.
            audio_tokenizer_path: see there.
            flow_path: see there.
            frontend_path: see there.
            device: see :class:`~vita_audio.inference.options.RuntimeOptions`.
            dtype: see there.
            attn_implementation: see there.
        """
        codec = CodecOptions(audio_tokenizer_type, audio_tokenizer_path, flow_path, frontend_path)
        return cls.open(model_dir, codec, RuntimeOptions(device, dtype, attn_implementation))

    @classmethod
    def open(
        cls,
        model_dir: str | PathLike[str],
        codec: CodecOptions | None = None,
        runtime: RuntimeOptions | None = None,
    ) -> SpeechPipeline:
        """Load a checkpoint, its tokenizer and a codec. Checks that need no weights run first.

        Raises:
            ValueError: a folder or file is missing or of another kind, the three do not match, or
                this machine lacks the requested device or attention.
        """
        codec, runtime = codec or CodecOptions(), runtime or RuntimeOptions()
        device = models.check_device(runtime.device or default_device())
        check_attention(runtime.attn_implementation, device)
        config = read_checkpoint_config(model_dir)
        check_family(config, codec.audio_tokenizer_type)
        opened = get_audio_tokenizer(
            codec.audio_tokenizer_type,
            codec.audio_tokenizer_path,
            flow_path=codec.flow_path,
            frontend_path=codec.frontend_path,
            device=str(device),
        )
        tokenizer = models.open_tokenizer(model_dir)
        check_fit(config, tokenizer, opened)
        model = models.open_model(
            model_dir, dtype=runtime.dtype, attn_implementation=runtime.attn_implementation, device=device
        )
        return cls(model, tokenizer, opened, runtime.engine, runtime.quantization)

    def chat(
        self,
        text: str,
        system: str | None = AUTO_SYSTEM,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
    ) -> Reply:
        """Answer a typed question. ``system``: see :func:`~vita_audio.inference.options.system_message`."""
        return self.reply(prompts.chat(text, self.system_message(system)), options)

    def speech_to_speech(
        self,
        audio: AudioLike,
        text: str = "",
        system: str | None = AUTO_SYSTEM,
        voice: AudioLike | None = None,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
    ) -> Reply:
        """Answer a spoken question, in the voice of ``voice`` if given. ``system`` as in :meth:`chat`."""
        conversation = prompts.speech_to_speech(audio, text, self.system_message(system), voice)
        return self.reply(conversation, options)

    def transcribe(self, audio: AudioLike, options: GenerationOptions = CHECKPOINT_OPTIONS) -> Reply:
        """Transcribe speech (ASR)."""
        return self.reply(prompts.transcription(audio), options)

    def synthesize(
        self, text: str, voice: AudioLike | None = None, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Reply:
        """Read text aloud (TTS), in the voice of ``voice`` if given (voice cloning)."""
        return self.reply(prompts.synthesis(text, voice), options)

    def system_message(self, choice: str | None = AUTO_SYSTEM) -> str | None:
        """The system message for a choice, by default the one that the model was trained with."""
        return system_message(choice, self.model.config)

    def prompt(self, conversation: Conversation) -> Example:
        """Token ids (and features) of a conversation, ending where the reply begins."""
        return build_prompt(conversation.messages, conversation.audios, self.tokenizer, self.codec)

    def request(
        self,
        conversation: Conversation,
        options: GenerationOptions = CHECKPOINT_OPTIONS,
        sound: Sound = "streamed",
    ) -> Request:
        """A conversation prepared for the backend; its clock starts now."""
        asked = time.perf_counter()
        return Request(self.prompt(conversation), options, sound, asked)

    def session(self, system: str | None = AUTO_SYSTEM) -> ChatSession:
        """A conversation over several turns. ``system`` as in :meth:`chat`."""
        return ChatSession(self, system)

    def stream(
        self, conversation: Conversation, options: GenerationOptions = CHECKPOINT_OPTIONS
    ) -> Generator[Event, None, None]:
        """Answer one conversation as a stream: text and sound as they are generated, then the reply.

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


def read_checkpoint_config(model_dir: str | PathLike[str]) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: it cannot be used. If the folder does not exist, the message explains how to get a small one.
    """
    try:
        return models.open_config(model_dir)
    except models.CheckpointError as error:
        if Path(model_dir).exists():
            raise
        raise models.CheckpointError(
            f"{error}; bash scripts/quickstart.sh makes a small one to talk to"
        ) from error


def default_device() -> str:
    """This process's GPU, else the CPU."""
    return f"cuda:{local_rank()}" if torch.cuda.is_available() else "cpu"


def check_attention(name: str | None, device: torch.device) -> None:
    """Refuse FlashAttention on a machine where it cannot run.

    Raises:
        ValueError: the package or a GPU is missing.
    """
    if name != "flash_attention_2":
        return
    if not is_flash_attn_2_available():
        raise ValueError("attn_implementation flash_attention_2: flash-attn is not installed; use sdpa")
    if device.type != "cuda":
        raise ValueError(f"attn_implementation flash_attention_2: needs a GPU, not {device}; use sdpa")


def check_family(config: PreTrainedConfig, kind: str) -> None:
    """Refuse a codec whose output the model cannot read, judging by its name only.

    Raises:
        ValueError: a plain language model, or codes for a model that reads features, or the reverse.
    """
    if not isinstance(config, Qwen2MTPConfig):
        raise ValueError(
            f"the checkpoint is a plain {config.model_type}; give one saved by training (qwen2_mtp)"
        )
    if is_continuous_kind(kind) != config.continuous_input:
        raise ValueError(_other_family(f"a {config.model_type} model", kind, config.continuous_input))


def check_fit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer) -> None:
    """Refuse a model, a tokenizer and a codec that do not match.

    Raises:
        ValueError: more tokens than the model embeds; see also :func:`check_family` and :func:`check_codec`.
    """
    check_family(config, codec.kind)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {config.vocab_size}; "
            "give the tokenizer saved with the model"
        )
    check_codec(tokenizer, codec)


def check_codec(tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer) -> None:
    """Refuse a tokenizer and a codec that do not match.

    Raises:
        ValueError: speech tokens of another codec, or of the other family.
    """
    tokens = ChatTokens.of(tokenizer)
    if tokens.codebook_size != codec.codebook_size:
        raise ValueError(
            f"the tokenizer has {tokens.codebook_size} speech tokens, the {codec.kind} codec {codec.codebook_size} "
            "codes; give the codec the model was trained with"
        )
    continuous_input = tokens.context is not None
    if codec.continuous_input != continuous_input:
        raise ValueError(_other_family("a model with this tokenizer", codec.kind, continuous_input))


def _other_family(model: str, kind: str, continuous_input: bool) -> str:
    discrete = kind.removeprefix("sensevoice_")
    fitting = f"sensevoice_{discrete}" if continuous_input else discrete
    return f"{model} does not read the {kind} codec; give --audio_tokenizer_type {fitting}"
