"""VITA-Audio for Kimi-Audio-Evalkit: copy or link this file into its ``almeval/models/``.

The Evalkit finds the class automatically and passes it the entry of the same name in its ``config.yaml``:

    MODELS:
      VITA-Audio:
        model_dir: models/VITA-Audio-Boost
        audio_tokenizer_type: glm4voice
        audio_tokenizer_path: models/THUDM/glm-4-voice-tokenizer

    bash run_audio.sh --model VITA-Audio --data LibriSpeech

Keys are the arguments of :class:`VitaAudio`. To compare several checkpoints, add a subclass with its own
``NAME`` for each.
"""

from collections.abc import Mapping
from typing import Any

from almeval.models.base import BaseModel

from vita_audio.chat import Message
from vita_audio.constants import ASR_PROMPT
from vita_audio.inference import AUTO_SYSTEM, Conversation, GenerationOptions, SpeechPipeline


class VitaAudio(BaseModel):
    """Text answers to speech, made by :class:`~vita_audio.inference.SpeechPipeline`.

    Args:
        model_path: the entry of ``config.yaml``: the model's folder, or a mapping of the following arguments with
            ``model_dir`` for the folder.
        greedy: take the most likely token at every step; otherwise sampling and penalties come from the checkpoint's
            generation_config.json.
        generation: other options, by the names of ``GenerationOptions``: ``mode``, ``max_new_tokens``, ``seed``, …
        system_prompt: for everything except speech recognition: ``auto`` (the one that the model was trained with),
            ``luke``, ``omni``, ``none``, or the text itself.
        arguments: arguments of ``SpeechPipeline.from_pretrained``: the codec's kind and folders, ``device``,
            ``dtype``. A flow decoder is not needed, since only text is scored.

    Raises:
        ValueError: a folder is missing or does not fit.
    """

    NAME = "VITA-Audio"

    def __init__(
        self,
        model_path: str | Mapping[str, Any],
        **arguments: Any,
    ) -> None:
        settings = {"model_dir": model_path} if isinstance(model_path, str) else dict(model_path)
        settings |= arguments
        system = settings.pop("system_prompt", AUTO_SYSTEM)
        options = GenerationOptions.greedy if settings.pop("greedy", False) else GenerationOptions
        self.options = options(**settings.pop("generation", {}))
        self.pipeline = SpeechPipeline.from_pretrained(**settings)
        self.system = self.pipeline.system_message(system)

    def generate_inner(self, msg: dict[str, Any]) -> tuple[str, str]:
        """Answer one item of a data set.

        Args:
            msg: ``audio``, one path or several; ``text``, the question or instruction, empty if it is spoken; and
                ``meta``, whose ``task`` names the task.

        Returns:
            The prompt, and the text of the reply.
        """
        conversation = self.conversation(msg)
        reply = self.pipeline.reply(conversation, self.options, decode=False)
        return "\n".join(message.content for message in conversation.messages), reply.text

    def conversation(self, msg: dict[str, Any]) -> Conversation:
        """The prompt of an item: for speech recognition worded as in the training data, otherwise as in the item."""
        audios = [msg["audio"]] if isinstance(msg["audio"], str) else list(msg["audio"])
        recognition = (msg.get("meta") or {}).get("task") == "ASR"
        text = ASR_PROMPT if recognition else (msg.get("text") or "").strip()
        user = Message("user", (f"{text}\n" if text else "", *[""] * len(audios)))
        system = (Message("system", (self.system,)),) if self.system and not recognition else ()
        return Conversation((*system, user), tuple(audios))
