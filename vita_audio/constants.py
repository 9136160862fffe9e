"""Every special string of the project: tokens, tags, task prompts, label mask.

The order of the special tokens determines their ids, and so the rows of the released
embedding matrices; see section 2 of the data specification.
"""

IGNORE_INDEX = -100
"""Label of positions that carry no loss (PyTorch's cross-entropy default)."""

# ChatML, as Qwen2 writes it. All three exist in the base tokenizer.
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

# Speech in the text stream.
AUDIO_TAG = "<|audio|>"
BEGIN_OF_AUDIO = "<|begin_of_audio|>"
END_OF_AUDIO = "<|end_of_audio|>"
CONTEXT_OF_AUDIO = "<|context_of_audio|>"

AUDIO_CODEBOOK_SIZE = 16384
"""Codes of the GLM-4-Voice tokenizer."""

EMBEDDING_ROW_MULTIPLE = 8
"""Embedding matrices are padded to a multiple of this (released: 168,072 rows)."""


def audio_token(code: int) -> str:
    """Text form of one speech code, ``<|audio_CODE|>``."""
    return f"<|audio_{code}|>"


def special_tokens(continuous_input: bool) -> list[str]:
    """Special tokens added after the base vocabulary, in id order.

    Args:
        continuous_input: whether user speech enters as continuous features
            (the Plus family); only then is ``<|context_of_audio|>`` a token.

    Returns:
        20 strings, 21 with ``continuous_input``.
    """
    visual = [
        f"<|{edge}_of_{what}|>"
        for what in ("image", "video", "patch")
        for edge in ("begin", "end", "context")
    ]
    speech = [BEGIN_OF_AUDIO, END_OF_AUDIO]
    if continuous_input:
        speech.append(CONTEXT_OF_AUDIO)
    grounding = [f"<|{edge}_of_{what}|>" for what in ("quad", "ref", "box") for edge in ("begin", "end")]
    return [*visual, *speech, *grounding, "<|image|>", "<|video|>", AUDIO_TAG]


DEFAULT_TEXT_AUDIO_RATIO = (1, 10, 4, 10)
"""Text-audio run lengths of interleaved replies in all published stages."""

# Task prompts (section 5 of the data specification).
ASR_PROMPT = "Convert the speech to text."
TTS_PROMPT = "Convert the text to speech."
VOICE_PROMPT = f"Your Voice: {AUDIO_TAG}\n"
LUKE_SYSTEM_PROMPT = "Your Name: Luke\nYour Gender: male\n\nRespond in a text-audio interleaved manner."
OMNI_SYSTEM_PROMPT = "Your Name: Omni\nYour Gender: female\nRespond in a text-audio interleaved manner."
