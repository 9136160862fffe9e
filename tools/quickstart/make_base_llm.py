"""A small base LLM with random weights and its own text tokenizer, as an ordinary Hugging Face folder.

    python tools/quickstart/make_base_llm.py --corpus corpus --config configs/quickstart/model.json --out base

It replaces Qwen2.5 where there is no model hub: a Qwen2 of the given sizes, and a byte-level BPE
tokenizer trained on the corpus's text, with Qwen2's class and ChatML tokens. It has no audio
tokens: training adds them, as it does to Qwen2.5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from corpus_files import texts, training_files
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from vita_audio.cli.arguments import command_parser, run_command
from vita_audio.constants import (
    EMBEDDING_ROW_MULTIPLE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    LUKE_SYSTEM_PROMPT,
    OMNI_SYSTEM_PROMPT,
)

TEXT_VOCABULARY = 512
"""Byte-level BPE tokens: the 256 bytes and the corpus's words."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{IM_START}' + message['role'] + '\\n' + message['content'] + '{IM_END}' + '\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{IM_START}assistant\\n' }}}}{{% endif %}}"
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="DIR", help="folder with *_train.jsonl")
    parser.add_argument(
        "--config", type=Path, required=True, metavar="JSON", help="sizes, fields of Qwen2Config"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--vocabulary", type=int, default=TEXT_VOCABULARY, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    tokenizer = train_tokenizer(corpus_text(args.corpus), args.vocabulary)
    model = random_model(args.config, tokenizer, args.seed)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {len(tokenizer)} text tokens in {args.out}")


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Qwen2Tokenizer:
    """Byte-level BPE on ``texts``, after Qwen2's normaliser and pre-tokeniser."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    # The class would add its special tokens in another order; this is Qwen2's order.
    specials = {token: len(trained["vocab"]) + i for i, token in enumerate((END_OF_TEXT, IM_START, IM_END))}
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"] | specials,
        merges=[tuple(merge) for merge in trained["merges"]],
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[IM_START, IM_END],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def random_model(config_file: Path, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A Qwen2 of the sizes in ``config_file``.

    Raises:
        ValueError: the file is not JSON, or its sizes do not fit together.
    """
    try:
        sizes = json.loads(config_file.read_text(encoding="utf-8"))
        rows = -(-len(tokenizer) // EMBEDDING_ROW_MULTIPLE) * EMBEDDING_ROW_MULTIPLE
        config = Qwen2Config(
            **sizes,
            vocab_size=rows,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
            pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        )
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{config_file}: no usable model sizes: {error}") from error


def corpus_text(corpus: Path) -> Iterator[str]:
    """Contents of all training messages, and the prompts used at inference.

    Raises:
        ValueError: the folder has no training files, or a line of one is not a sample.
    """
    files = training_files(corpus)
    # Often enough that their words become tokens.
    for prompt in (LUKE_SYSTEM_PROMPT, OMNI_SYSTEM_PROMPT, "system\n", "user\n", "assistant\n"):
        yield from [prompt] * 100
    yield from texts(files)


if __name__ == "__main__":
    run_command(main)
