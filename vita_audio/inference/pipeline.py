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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from vita_audio.audio import AudioLike, AudioTokenizer, get_audio_tokenizer
from vita_audio.constants import BEGIN_OF_AUDIO, END_OF_AUDIO, END_OF_TEXT, IM_END, audio_token
from vita_audio.data.chat import build_prompt, split_reply
from vita_audio.inference import prompts
from vita_audio.inference.engine import GenerationOptions, TokenTap, generate_batch
from vita_audio.inference.prompts import Conversation
from vita_audio.inference.streaming import (
    AudioChunk,
    ReplySplitter,
    TextDelta,
    Timings,
    Transcript,
    stream_reply,
)

if TYPE_CHECKING:
    from vita_audio.data.chat import Example

GREEDY_BOOST = GenerationOptions()


@dataclass(frozen=True)
class Reply:
    """What the model answered.

    Attributes:
        text: without special tokens.
        codes: the speech, in ``[0, codebook_size)``.
        waveform: (samples,) float32; None where there are no codes or decoding was not asked for.
        sample_rate: of ``waveform``, in Hz.
        token_ids: as generated, without the token that ended the reply.
        timings: when what came out; None in batches, whose rows share their time.
    """

    text: str
    codes: list[int]
    waveform: torch.Tensor | None
    sample_rate: int
    token_ids: list[int]
    timings: Timings | None = None


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
        _check_fit(model, tokenizer, codec)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.codec = codec
        self._pad_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]

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
            model_dir: folder (or hub name) of a ``qwen2_mtp`` or ``qwen2_mtp_sensevoice`` checkpoint.
            audio_tokenizer_type: codec kind, see ``vita_audio.audio.available_kinds()``.
            audio_tokenizer_path, flow_path, frontend_path: see ``get_audio_tokenizer``.
            device: CUDA where there is one, unless said otherwise.
            dtype: of the model; ``"auto"`` is the checkpoint's own.

        Raises:
            ValueError: a folder or file is missing, or the three do not belong together.
            OSError: transformers cannot read the checkpoint.
        """
        import vita_audio.models  # noqa: F401  (registers the model types)

        _check_folder(model_dir)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        codec = get_audio_tokenizer(
            audio_tokenizer_type,
            audio_tokenizer_path,
            flow_path=flow_path,
            frontend_path=frontend_path,
            device=device,
        )
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        config = AutoConfig.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, config=config, dtype=dtype, attn_implementation=attn_implementation
        )
        return cls(model.to(device), tokenizer, codec)

    def chat(self, text: str, system: str | None = None, options: GenerationOptions = GREEDY_BOOST) -> Reply:
        """Answer a typed question."""
        return self.reply(prompts.chat(text, system), options)

    def speech_to_speech(
        self,
        audio: AudioLike,
        text: str = "",
        system: str | None = None,
        voice: AudioLike | None = None,
        options: GenerationOptions = GREEDY_BOOST,
    ) -> Reply:
        """Answer a spoken question, in the voice of ``voice`` if given."""
        return self.reply(prompts.speech_to_speech(audio, text, system, voice), options)

    def transcribe(self, audio: AudioLike, options: GenerationOptions = GREEDY_BOOST) -> Reply:
        """Write speech down (ASR)."""
        return self.reply(prompts.transcription(audio), options)

    def synthesize(
        self, text: str, voice: AudioLike | None = None, options: GenerationOptions = GREEDY_BOOST
    ) -> Reply:
        """Read text aloud (TTS), in the voice of ``voice`` if given (voice cloning)."""
        return self.reply(prompts.synthesis(text, voice), options)

    def prompt(self, conversation: Conversation) -> Example:
        """Token ids (and features) of a conversation, ending where the reply begins."""
        return build_prompt(conversation.messages, conversation.audios, self.tokenizer, self.codec)

    def reply(
        self,
        conversation: Conversation,
        options: GenerationOptions = GREEDY_BOOST,
        *,
        decode: bool = True,
    ) -> Reply:
        """Answer one conversation; ``decode=False`` leaves the speech as codes."""
        started = time.perf_counter()
        prompt = self.prompt(conversation)
        prompt_seconds = time.perf_counter() - started
        times: list[float] = []
        splitter, first_chunk = ReplySplitter(self.tokenizer, self.codec.codebook_size), None

        def on_token(token: int) -> None:
            nonlocal first_chunk
            times.append(time.perf_counter() - started)
            if (
                first_chunk is None
                and token not in self._stop_ids
                and isinstance(splitter.push(token), tuple)
            ):
                first_chunk = times[-1]

        (ids,) = generate_batch(
            self.model,
            [prompt],
            options,
            pad_id=self._pad_id,
            stop_ids=self._stop_ids,
            streamer=TokenTap(on_token),
        )
        generated = time.perf_counter() - started
        text, codes, waveform = self._read(ids, decode)
        timings = Timings(
            prompt=prompt_seconds,
            first_token=times[0] if times else None,
            first_chunk=first_chunk,
            first_sound=None,
            generated=generated,
            total=time.perf_counter() - started,
            new_tokens=len(times),
        )
        return Reply(text, codes, waveform, self.codec.sample_rate, ids, timings)

    def reply_batch(
        self,
        conversations: Sequence[Conversation],
        options: GenerationOptions = GREEDY_BOOST,
        *,
        decode: bool = True,
    ) -> list[Reply]:
        """Answer several conversations in one batch; greedy replies equal those given one by one."""
        prepared = [self.prompt(conversation) for conversation in conversations]
        return self.reply_to_prompts(prepared, options, decode=decode)

    def reply_to_prompts(
        self, prepared: Sequence[Example], options: GenerationOptions = GREEDY_BOOST, *, decode: bool = True
    ) -> list[Reply]:
        """As :meth:`reply_batch`, for prompts that :meth:`prompt` has made."""
        rows = generate_batch(self.model, prepared, options, pad_id=self._pad_id, stop_ids=self._stop_ids)
        return [Reply(*self._read(ids, decode), self.codec.sample_rate, ids) for ids in rows]

    def stream(
        self, conversation: Conversation, options: GenerationOptions = GREEDY_BOOST
    ) -> Iterator[TextDelta | AudioChunk | Reply]:
        """Answer while generating: text and sound as they come, then the whole reply.

        Closing the iterator stops generation. All seconds count from this call's first step.
        """
        started = time.perf_counter()
        prompt = self.prompt(conversation)
        prompt_seconds = time.perf_counter() - started
        transcript = Transcript()
        rows: list[list[int]] = []

        def generate(tap: TokenTap, stop) -> None:
            rows.extend(
                generate_batch(
                    self.model,
                    [prompt],
                    options,
                    pad_id=self._pad_id,
                    stop_ids=self._stop_ids,
                    streamer=tap,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
            )

        yield from stream_reply(
            generate,
            ReplySplitter(self.tokenizer, self.codec.codebook_size),
            self.codec,
            transcript,
            started,
            frozenset(self._stop_ids),
        )
        times = transcript.token_times
        timings = Timings(
            prompt=prompt_seconds,
            first_token=times[0] if times else None,
            first_chunk=transcript.first_chunk,
            first_sound=transcript.first_sound,
            generated=times[-1] if times else prompt_seconds,
            total=time.perf_counter() - started,
            new_tokens=len(times),
        )
        waveform = torch.cat(transcript.samples) if transcript.samples else None
        yield Reply(transcript.text, transcript.codes, waveform, self.codec.sample_rate, rows[0], timings)

    def _read(self, ids: Sequence[int], decode: bool) -> tuple[str, list[int], torch.Tensor | None]:
        text, codes = split_reply(ids, self.tokenizer)
        waveform = self.codec.decode(codes) if decode and codes else None
        return text, codes, waveform


def _check_folder(model_dir: str | PathLike[str]) -> None:
    folder = Path(model_dir)
    if folder.is_absolute() or str(model_dir).startswith(".") or folder.exists():
        for name in ("config.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: {name} is missing; give a folder that training has saved")


def _check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, codec: AudioTokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    needed = [IM_END, BEGIN_OF_AUDIO, END_OF_AUDIO, audio_token(0), audio_token(codec.codebook_size - 1)]
    lacking = [token for token in needed if token not in vocabulary]
    if lacking:
        raise ValueError(
            f"the tokenizer lacks {lacking[0]}, which the {codec.kind} codec needs; "
            "give the codec the model was trained with"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model embeds only {rows}")
    if not hasattr(model.config, "num_nextn_predict_layers"):
        raise ValueError(
            f"the checkpoint is a plain {model.config.model_type}; give one that training has saved (qwen2_mtp)"
        )
    hears_features = model.config.model_type.endswith("sensevoice")
    if codec.continuous_input != hears_features:
        kind = codec.kind.removeprefix("sensevoice_")
        fitting = f"sensevoice_{kind}" if hears_features else kind
        raise ValueError(
            f"a {model.config.model_type} model does not read the {codec.kind} codec; "
            f"give --audio_tokenizer_type {fitting}"
        )
