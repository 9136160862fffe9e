"""A conversation <-> token ids: one reader, one renderer and one parser for the whole project."""

from vita_audio.chat import prompts
from vita_audio.chat.files import SampleFileError, locate, read_samples, sample_lines
from vita_audio.chat.interleave import interleave_text_audio
from vita_audio.chat.paths import default_data_root, locate_file
from vita_audio.chat.render import Example, build_example, build_prompt
from vita_audio.chat.reply import ReplyParser, check_token_id, split_reply
from vita_audio.chat.sample import Conversation, Message, Reason, Sample, SampleError, parse_sample
from vita_audio.chat.tokens import ChatTokens, encode_text, extend_tokenizer

__all__ = [
    "ChatTokens",
    "Conversation",
    "Example",
    "Message",
    "Reason",
    "ReplyParser",
    "Sample",
    "SampleError",
    "SampleFileError",
    "build_example",
    "build_prompt",
    "check_token_id",
    "default_data_root",
    "encode_text",
    "extend_tokenizer",
    "interleave_text_audio",
    "locate",
    "locate_file",
    "parse_sample",
    "prompts",
    "read_samples",
    "sample_lines",
    "split_reply",
]
