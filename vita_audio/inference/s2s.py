"""``S2SInference``: the original repository's class, for evaluation suites and voice bots that import it.

    model = S2SInference("VITA-Audio-Boost", "models/THUDM/glm-4-voice-tokenizer", "glm4voice", "models/…-decoder")
    output, speech = model.run_infer(audio_path="question.wav")

Signatures and results match the original; it wraps :class:`~vita_audio.inference.pipeline.SpeechPipeline`,
which new code should use. Unlike the original, only the reply's own codes are decoded to speech.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vita_audio.audio import AudioLike, is_continuous_kind
from vita_audio.audio.resampling import resample
from vita_audio.chat import Conversation, Message, prompts, split_reply
from vita_audio.chat.prompts import SYSTEM_PROMPTS
from vita_audio.constants import VOICE_PROMPT
from vita_audio.inference.options import AUTO_SYSTEM, CodecOptions, GenerationOptions
from vita_audio.inference.pipeline import SpeechPipeline
from vita_audio.inference.replies import Request
from vita_audio.models.configuration import num_positions
from vita_audio.tokenizer import find_frontend

SPEECH_RATE = 22_050
"""Sample rate in Hz of the speech that :meth:`S2SInference.run_infer` returns."""


class S2SInference:
    """A checkpoint and its codec.

    Args:
        model_name_or_path: checkpoint folder.
        audio_tokenizer_path: folder of the speech tokenizer's weights.
        audio_tokenizer_type: codec kind, such as ``"glm4voice"`` or ``"sensevoice_glm4voice"``.
        flow_path: folder of the decoder's weights, for codecs that keep them apart.

    Attributes:
        pipeline: the wrapped pipeline.

    Raises:
        ValueError: see :meth:`SpeechPipeline.open`.
    """

    def __init__(
        self,
        model_name_or_path: str | PathLike[str],
        audio_tokenizer_path: str | PathLike[str],
        audio_tokenizer_type: str,
        flow_path: str | PathLike[str] | None = None,
    ) -> None:
        codec = CodecOptions(audio_tokenizer_type, audio_tokenizer_path, flow_path)
        if is_continuous_kind(audio_tokenizer_type):
            codec = replace(codec, frontend_path=find_frontend(audio_tokenizer_path, model_name_or_path))
        self.pipeline = SpeechPipeline.open(model_name_or_path, codec)

    def run_infer(
        self,
        audio_path: AudioLike | None = None,
        prompt_audio_path: AudioLike | None = None,
        stream_stride: int = 4,
        max_returned_tokens: int = 4096,
        sample_rate: int = 16_000,
        request_id: str = "",
        audio_feats: None = None,
        message: str = "",
        use_past: bool = False,
        mode: str | None = "luke",
        do_sample: bool = False,
        mtp_inference_mode: Sequence[int] | str | None = None,
    ) -> tuple[str, Tensor | None]:
        """Answer a question.

        ``stream_stride``, ``sample_rate``, ``request_id`` and ``use_past`` are accepted and have no effect; the
        sample rate is the audio's own.

        Args:
            audio_path: the spoken question.
            prompt_audio_path: speech in the voice to answer with; replaces the system message.
            max_returned_tokens: maximum length of the reply, which also ends where the model's positions end.
            audio_feats: not supported.
            message: a typed question, or an instruction before the spoken one.
            mode: ``"luke"`` for the Luke system message, None for the model's default.
            do_sample: draw tokens as the checkpoint's generation_config.json specifies.
            mtp_inference_mode: schedule; None for the checkpoint's.

        Returns:
            The decoded sequence with special tokens, prompt included; and the speech, (samples,) float32 at
            22,050 Hz, or None if the reply holds none.

        Raises:
            ValueError: there is no question or a too long one, or an argument is not supported.
        """
        request = self._request(
            audio_path, prompt_audio_path, max_returned_tokens, audio_feats, message, mode, do_sample,
            mtp_inference_mode,
        )  # fmt: skip
        with closing(self.pipeline.backend.tokens(request)) as tokens:
            ids = list(tokens)
        output = self._decode([*request.prompt.input_ids, *ids])
        _, codes = split_reply(ids, self.pipeline.tokenizer)
        if not codes:
            return output, None
        codec = self.pipeline.codec
        return output, resample(codec.decode(codes), codec.sample_rate, SPEECH_RATE)

    def run_infer_stream(
        self,
        audio_path: AudioLike | None = None,
        prompt_audio_path: AudioLike | None = None,
        stream_stride: int = 4,
        max_returned_tokens: int = 4096,
        sample_rate: int = 16_000,
        request_id: str = "",
        audio_feats: None = None,
        message: str = "",
        use_past: bool = False,
        mode: str | None = "luke",
        do_sample: bool = False,
        mtp_inference_mode: Sequence[int] | str | None = None,
    ) -> Generator[str, None, None]:
        """The reply's text as it is decoded, including special tokens; arguments as in :meth:`run_infer`.

        A caller decodes speech when it sees ``<|end_of_audio|>``. Closing the iterator ends generation.
        """
        request = self._request(
            audio_path, prompt_audio_path, max_returned_tokens, audio_feats, message, mode, do_sample,
            mtp_inference_mode,
        )  # fmt: skip
        held: list[int] = []
        with closing(self.pipeline.backend.tokens(request)) as tokens:
            for token in tokens:
                held.append(token)
                piece = self._decode(held)
                if not piece.endswith("\ufffd"):  # otherwise the text ends inside a multi-byte character
                    yield piece
                    held.clear()
        if held:
            yield self._decode(held)

    def _request(
        self,
        audio: AudioLike | None,
        voice: AudioLike | None,
        max_new_tokens: int,
        audio_feats: Any,
        message: str,
        mode: str | None,
        do_sample: bool,
        schedule: Sequence[int] | str | None,
    ) -> Request:
        if audio_feats is not None:
            raise ValueError(
                "audio_feats: not supported; give audio_path, a path or a waveform with its rate"
            )
        if audio is None and not message:
            raise ValueError("nothing to answer: give audio_path, message or both")
        if mode is not None and mode not in SYSTEM_PROMPTS:
            raise ValueError(f"mode {mode!r}: use {', '.join(SYSTEM_PROMPTS)} or None")
        system = self.pipeline.system_message(AUTO_SYSTEM if mode is None else mode)
        if audio is not None:
            conversation = prompts.speech_to_speech(audio, message, system, voice)
        elif voice is not None:
            user = Message("user", (message,))
            conversation = Conversation((Message.of("system", VOICE_PROMPT), user), (voice,))
        else:
            conversation = prompts.chat(message, system)
        options = GenerationOptions(schedule, max_new_tokens, do_sample)
        request = self.pipeline.request(conversation, options, sound="none")
        room = num_positions(self.pipeline.model.config) - len(request.prompt.input_ids)
        return replace(request, options=replace(options, max_new_tokens=min(max_new_tokens, max(room, 1))))

    def _decode(self, ids: Sequence[int]) -> str:
        decoded = self.pipeline.tokenizer.decode(
            torch.tensor(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(decoded, str)
        return decoded
