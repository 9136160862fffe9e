"""The speaker of a stage's validation: answers requests with the model that trains, and has them recognised.

tools/finetune_sts.py makes it from its options and hands it to the trainer, which knows neither inference nor
evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vita_audio.audio import AudioTokenizer, get_audio_tokenizer
from vita_audio.chat import Conversation, prompts
from vita_audio.data import CodecSpec
from vita_audio.evaluation.metrics import utterance_errors
from vita_audio.evaluation.normalisers import plain_words
from vita_audio.evaluation.transcribers import Transcriber, TranscriberConfig
from vita_audio.inference import GenerationOptions, SpeechPipeline
from vita_audio.inference.replies import Reply
from vita_audio.training.validation import Spoken
from vita_audio.training.validation_arguments import ValidationArguments


class ValidationSpeaker:
    """Answers a fixed list of requests, greedily.

    Args:
        tokenizer: the text tokenizer of the model.
        codec: encodes the requests and decodes the answers.
        requests: with their numbers among those of all ranks.
        longest: tokens in an answer, at most.
        transcriber: hears the answers; None: nobody does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        codec: AudioTokenizer,
        requests: Sequence[tuple[int, Conversation]],
        longest: int,
        transcriber: Transcriber | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._codec = codec
        self._requests = requests
        self._options = GenerationOptions(max_new_tokens=longest, do_sample=False, repetition_penalty=1.0)
        self._transcriber = transcriber

    def __call__(self, model: PreTrainedModel) -> list[Spoken]:
        """Answer every request."""
        # Not the engine: it would hold a second copy of the weights.
        pipeline = SpeechPipeline(model, self._tokenizer, self._codec, engine=False)  # type: ignore[arg-type]
        return [
            self._spoken(number, request, pipeline.reply(request, self._options))
            for number, request in self._requests
        ]

    def _spoken(self, number: int, request: Conversation, reply: Reply) -> Spoken:
        task = prompts.task_of(request)
        question = request.messages[-1]
        should_say = prompts.requested_text(question) or reply.text
        lines = [f"**{question.role}** {question.content}", f"**assistant** {reply.text}"]
        errors = words = None
        if self._transcriber is not None:
            heard = None
            if reply.waveform is not None:
                heard = self._transcriber.transcribe(reply.waveform, reply.sample_rate)
            lines.append("**heard** " + ("(no speech)" if heard is None else heard))
            errors, words = utterance_errors(
                plain_words(should_say), None if heard is None else plain_words(heard)
            )
        name = f"{task.lower().replace(' ', '_')}_{number}"
        return Spoken(name, "\n\n".join(lines), reply.waveform, reply.sample_rate, errors, words)


def open_speaker(
    options: ValidationArguments,
    codec: CodecSpec,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Conversation],
    *,
    rank: int,
    world_size: int,
) -> ValidationSpeaker | None:
    """The speaker of this rank's share of the requests; None if there are none.

    Raises:
        ValueError: codec or recogniser cannot be opened, or the codec cannot decode.
    """
    if not requests:
        return None
    opened = get_audio_tokenizer(
        codec.kind, codec.path, flow_path=options.eval_flow_path, frontend_path=codec.frontend_path
    )
    if opened.kind.endswith("glm4voice") and options.eval_flow_path is None:
        raise ValueError(
            "--eval_flow_path: speaking the validation's answers needs the folder of the codec's decoder; give it, or "
            "--eval_speech_samples 0"
        )
    transcriber = None
    if options.eval_transcriber is not None:
        config = TranscriberConfig(
            options.eval_transcriber, options.eval_transcriber_path, options.eval_grammar
        )
        transcriber = config.open()
    share = list(enumerate(requests))[rank::world_size]
    return ValidationSpeaker(tokenizer, opened, share, options.eval_speech_tokens, transcriber)
