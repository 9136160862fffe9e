"""Text sets: questions and answers, instructions, long contexts, reasoning."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow

from miniatures.files import Expected, lines, parquet, table, write


def text_set(folder: str, files: dict[str, tuple[str, list[dict | str]]]):
    """A maker of text sets: outputs by name, with the publisher's file and rows. A broken line is rejected."""

    def make(source: Path) -> Expected:
        for file, rows in files.values():
            write_rows(source / file, rows)
        bad = {"bad_row": 1}
        return {
            f"datasets/jsonl/{folder}/{name}": (
                sum(isinstance(row, dict) for row in rows),
                bad if any(isinstance(row, str) for row in rows) else {},
            )
            for name, (_, rows) in files.items()
        }

    return make


def write_rows(path: Path, rows: list[dict | str]) -> None:
    if path.suffix == ".parquet":
        parquet(path, [row for row in rows if isinstance(row, dict)])
    elif path.suffix == ".json":
        write(path, json.dumps(rows))
    elif path.suffix == ".csv":
        write(path, table(rows, ","))
    elif path.suffix == ".zst":
        write(path, pyarrow.compress(lines(*rows).encode(), "zstd", asbytes=True))
    elif path.suffix == ".zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for number, row in enumerate(rows):
                archive.writestr(f"math/{number:03d}.json", json.dumps(row))
    else:
        write(path, lines(*rows))


def human(*turns: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]


def roles(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


Q, A = "What is two plus two?", "It is four."
BROKEN = '{"instruction": "cut off'
PAIR = {"instruction": Q, "output": A}
LONG_NAMES = (
    "booksum_en multi_doc_qa_en_paraphrasing sharegpt_en short_instruction_from_alpaca_en translation_en2zh "
    "single_doc_qa_en_paraphrasing booksum_zh multi_doc_qa_zh_paraphrasing sharegpt_zh "
    "short_instruction_from_llama_chinese single_doc_qa_zh_paraphrasing"
).split()
LONG_DATA = "togethercomputer/Long-Data-Collections"
COMPLETION = {"text": f"{Q} {A}", "prompt": Q, "completion": A}
NEMOTRON = {"input": roles(Q), "output": A, "reasoning": "off", "category": "chat"}

TEXT_SETS: dict[str, Callable[[Path], Expected]] = {
    "BAAI/Infinity-Instruct": text_set(
        "BAAI/Infinity-Instruct",
        {
            "0625.jsonl": (
                "0625/train-00000-of-00005.parquet",
                [{"conversations": human(Q, A), "source": "code"}] * 3,
            )
        },
    ),
    "OpenHermes": text_set(
        "teknium/OpenHermes-2.5",
        {
            "openhermes2_5.jsonl": (
                "openhermes2_5.json",
                [{"conversations": [{"from": "system", "value": "Be brief."}, *human(Q, A)], "source": "x"}]
                * 3,
            )
        },
    ),
    "lima": text_set(
        "GAIR/lima",
        {
            "train.jsonl": (
                "train.jsonl",
                [{"conversations": [Q, A, "And five?", "Five."], "source": "x"}, BROKEN],
            )
        },
    ),
    "databricks-dolly-15k": text_set(
        "databricks/databricks-dolly-15k",
        {
            "databricks-dolly-15k.jsonl": (
                "databricks-dolly-15k.jsonl",
                [{"instruction": Q, "context": "", "response": A, "category": "qa"}, BROKEN],
            )
        },
    ),
    "MetaMathQA": text_set(
        "meta-math/MetaMathQA",
        {
            "MetaMathQA-395K.jsonl": (
                "MetaMathQA-395K.json",
                [{"type": "x", "query": Q, "response": A, "original_question": Q}],
            )
        },
    ),
    "MathInstruct": text_set(
        "TIGER-Lab/MathInstruct", {"MathInstruct.jsonl": ("MathInstruct.json", [{"source": "x", **PAIR}])}
    ),
    "orca-math-word-problems-200k": text_set(
        "microsoft/orca-math-word-problems-200k",
        {"data.jsonl": ("data/train-00000-of-00001.parquet", [{"question": Q, "answer": A}])},
    ),
    "atlas-math-sets": text_set(
        "AtlasUnified/atlas-math-sets", {"train.jsonl": ("data/atlas-math-train.jsonl", [PAIR, BROKEN])}
    ),
    "goat": text_set(
        "tiedong/goat", {"dataset.jsonl": ("dataset.json", [{**PAIR, "input": "2 + 2", "answer": "4"}])}
    ),
    "camel-ai": text_set(
        "camel-ai/math",
        {
            "math.jsonl": (
                "math.zip",
                [{"role_1": "x", "topic;": "y", "sub_topic": "z", "message_1": Q, "message_2": A}] * 2,
            )
        },
    ),
    "Long-Instruction-with-Paraphrasing": text_set(
        "yuyijiong/Long-Instruction-with-Paraphrasing",
        {
            f"{name}.jsonl": (
                f"Long-instruction-{'zh' if 'zh' in name else 'en'}/{name}.jsonl",
                [{"messages": roles(Q, A)}, BROKEN],
            )
            for name in LONG_NAMES
        },
    ),
    "Long": text_set(
        "",
        {
            "akoksal/LongForm/data.jsonl": (
                "akoksal/LongForm/data/train-00000-of-00001.parquet",
                [{"input": Q, "output": A, "source": "x"}],
            ),
            "THUDM/LongAlign-10k/long.jsonl": (
                "THUDM/LongAlign-10k/long.jsonl",
                [{"messages": roles(Q, A), "length": 9}, BROKEN],
            ),
            "THUDM/LongCite-45k/long.jsonl": (
                "THUDM/LongCite-45k/long.jsonl",
                [{"prompt": Q, "response": A}],
            ),
            "THUDM/LongWriter-6k/long.jsonl": ("THUDM/LongWriter-6k/long.jsonl", [{"messages": roles(Q, A)}]),
            "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl": (
                "YeungNLP/LongQLoRA-Dataset/LongQLoRA-SFT-Data-39k.jsonl",
                [{"conversation_id": 1, "category": "x", "input": Q, "output": A}],
            ),
            "Yukang/LongAlpaca-12k/LongAlpaca-12k.jsonl": (
                "Yukang/LongAlpaca-12k/LongAlpaca-12k.json",
                [{**PAIR, "input": "", "file": "x"}],
            ),
            f"{LONG_DATA}/natural_questions_10_200_docs.jsonl": (
                f"{LONG_DATA}/fine-tune/natural_questions_10_200_docs.jsonl.zst",
                [COMPLETION],
            ),
            f"{LONG_DATA}/booksum.jsonl": (f"{LONG_DATA}/fine-tune/booksum.jsonl.zst", [COMPLETION, BROKEN]),
            "KnutJaegersberg/longinstruct/longinstruct.jsonl": (
                "KnutJaegersberg/longinstruct/longinstruct.csv",
                [{"prompt": Q, "response": A}],
            ),
        },
    ),
    "open-thoughts/OpenThoughts2-1M": text_set(
        "open-thoughts/OpenThoughts2-1M",
        {
            "data.jsonl": (
                "data/train-00000-of-00038.parquet",
                [
                    {
                        "conversations": [{"from": "user", "value": Q}, {"from": "assistant", "value": A}],
                        "question": Q,
                    }
                ],
            )
        },
    ),
    "nvidia/Llama-Nemotron-Post-Training-Dataset": text_set(
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        {
            "SFT_chat.jsonl": ("SFT/chat/chat.jsonl", [NEMOTRON, BROKEN]),
            "SFT_code.jsonl": ("SFT/code/code_v1.1.jsonl", [NEMOTRON]),
            "SFT_science.jsonl": ("SFT/science/science.jsonl", [NEMOTRON]),
        },
    ),
    "glaiveai/reasoning-v1-20m": text_set(
        "glaiveai/reasoning-v1-20m",
        {"data.jsonl": ("data/train-00000-of-00240.parquet", [{"prompt": Q, "response": A}])},
    ),
    "nvidia/OpenCodeReasoning": text_set(
        "nvidia/OpenCodeReasoning",
        {
            "split_0.jsonl": (
                "split_0/train-00000-of-00030.parquet",
                [{"id": "1", "input": Q, "output": A, "source": "x"}],
            )
        },
    ),
    "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT": text_set(
        "Congliu/Chinese-DeepSeek-R1-Distill-data-110k-SFT",
        {"data.jsonl": ("distill_r1_110k_sft.jsonl", [{**PAIR, "input": "", "score": 10}, BROKEN])},
    ),
    "open-r1/OpenR1-Math-220k": text_set(
        "open-r1/OpenR1-Math-220k",
        {
            "all.jsonl": (
                "all/default-00000-of-00020.parquet",
                [{"problem": Q, "solution": A, "messages": roles(Q, A)}],
            )
        },
    ),
}
