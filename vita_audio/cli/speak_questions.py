"""Make spoken questions and answers from those of a text set, with any text-to-speech command or a model.

    python tools/speak_questions.py qa.jsonl --root ROOT --name spoken_qa \\
        --command "espeak-ng -v {voice} -w {out} {text}" --voices en-us en-gb+f3 --answer_voice en-us+f2
    python tools/speak_questions.py qa.jsonl --root ROOT --model_name_or_path MODEL \\
        --audio_tokenizer_path CODEC --flow_path DECODER --voices alice.wav bob.wav --agree --transcriber whisper

writes ROOT/NAME.jsonl: every user turn becomes speech, and every assistant turn text with speech, like AudioQA. With a
model, voices are recordings to imitate (``none``: its own voice). ``--agree`` rejects speech that a recogniser hears
differently. Rejections, restarts and several processes work as in tools/prepare_data.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vita_audio.audio import save_audio
from vita_audio.cli.arguments import CODEC, RUNTIME, command_parser, transcriber_group
from vita_audio.cli.prepare_data import CLEANING, checks_of, summary
from vita_audio.corpora import Settings, prepare
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Rejected
from vita_audio.corpora.speaking import CommandSpeaker, Speaker, SpokenTexts, speaking_recipe
from vita_audio.distributed import is_first
from vita_audio.inference import CodecOptions, GenerationOptions, RuntimeOptions, SpeechPipeline

OWN_VOICE = "none"


def main(argv: Sequence[str] | None = None) -> None:
    """Speak one file.

    Raises:
        ValueError: the file, the command, the model or an option cannot be used. Bad conversations are counted.
    """
    options = parse_options(argv)
    file, root = Path(options.file), Path(options.root)
    speaker = _speaker(options)
    layout = SpokenTexts(
        speaker.open, tuple(options.voices), options.answer_voice, options.max_characters, options.answers
    )
    settings = Settings(clips=options.clips, num_workers=options.num_workers, cleaning=CLEANING.read(options))
    checks = checks_of(
        options, repr((speaker, layout.voices, layout.answer_voice, layout.max_characters, layout.answers))
    )
    recipe = speaking_recipe(options.folder_name, file.name)
    tallies = prepare(recipe, file.parent, root, settings, checks, layout)
    if is_first():
        print(summary(tallies))


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="text samples: JSON lines, a JSON array or Parquet")
    parser.add_argument("--root", required=True, help="the data root: outputs go below it")
    parser.add_argument(
        "--name",
        dest="folder_name",
        default="spoken_qa",
        help="of the output below ROOT (default: spoken_qa)",
    )
    parser.add_argument(
        "--command", help="text-to-speech command with {text}, {out} and where it has voices {voice}"
    )
    parser.add_argument("--model_name_or_path", metavar="MODEL", help="speak with a model instead")
    parser.add_argument(
        "--voices", nargs="+", default=[OWN_VOICE], help=f"of the questions, in turn (default: {OWN_VOICE})"
    )
    parser.add_argument("--answer_voice", default=OWN_VOICE, help=f"of the answers (default: {OWN_VOICE})")
    parser.add_argument("--max_characters", type=int, default=600, help="of a spoken turn (default: 600)")
    parser.add_argument("--no_answers", dest="answers", action="store_false", help="leave the answers text")
    parser.add_argument(
        "--clips", choices=("tar", "files"), default="tar", help="see prepare_data.py (default: tar)"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--test_sets", nargs="+", metavar="FILE", default=[], help="see prepare_data.py")
    parser.add_argument(
        "--agree", action="store_true", help="reject what the recogniser below hears differently"
    )
    CLEANING.add_to(parser)
    transcriber_group().add_to(parser)
    CODEC.add_to(parser)
    RUNTIME.add_to(parser)
    options = parser.parse_args(argv)
    if (options.command is None) == (options.model_name_or_path is None):
        parser.error("give --command or --model_name_or_path")
    if not Path(options.file).is_file():
        parser.error(f"{options.file}: no such file")
    return options


def _speaker(options: argparse.Namespace) -> CommandSpeaker | ModelSpeaker:
    if options.command is not None:
        return CommandSpeaker(options.command)
    return ModelSpeaker(options.model_name_or_path, CODEC.read(options), RUNTIME.read(options))


@dataclass(frozen=True)
class ModelSpeaker:
    """The model's own synthesis, greedy; a voice is a recording to imitate. Opened in each worker."""

    model: str
    codec: CodecOptions
    runtime: RuntimeOptions

    def open(self) -> Speaker:
        return _Voice(SpeechPipeline.open(self.model, self.codec, self.runtime))


@dataclass(frozen=True)
class _Voice:
    pipeline: SpeechPipeline

    def __call__(self, text: str, voice: str) -> bytes:
        imitated = None if voice == OWN_VOICE else voice
        reply = self.pipeline.synthesize(text, imitated, GenerationOptions.greedy())
        if reply.waveform is None or not len(reply.waveform):
            raise Rejected(Rejection.NO_AUDIO, f"the model does not speak {text!r:.80}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speech.flac"
            save_audio(path, reply.waveform, reply.sample_rate)
            return path.read_bytes()
