"""Spoken questions and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from miniatures.files import CHINESE, DAMAGED, ENGLISH, Expected, clip, damaged, parquet, tar, write


def voice_assistant(source: Path) -> Expected:
    """The publisher's Parquet: answers are texts and codes of another codec."""
    rows = [
        {
            "split_name": "identity",
            "index": str(number),
            "round": "None",
            "question": text,
            "question_audio": {
                "bytes": damaged(number) if number == 2 else clip(number),
                "path": f"{number}.wav",
            },
            "answer": f"I think that {text}.",
            "answer_snac": "# 2682 # 1120",
        }
        for number, text in enumerate(ENGLISH)
    ]
    parquet(source / "data/train-00000-of-00325.parquet", rows)
    return {"datasets/jsonl/gpt-omni/VoiceAssistant-400K/data.jsonl": (2, DAMAGED)}


def audioqa(source: Path) -> Expected:
    """Turns that name recordings by the publisher's own paths; questions are unpacked, answers are in an archive."""
    conversations = []
    answers = {}
    for number, text in enumerate(CHINESE):
        question, answer = f"00000020{number}_question.wav", f"00000020{number}_F10.wav"
        write(source / f"QA_1450K_question_tar_16khz/question_shuf_part_8/wav/{question}", clip(number))
        answers[f"answer_part1_shuf_part_3/wav/{answer}"] = (
            damaged(number) if number == 2 else clip(10 + number)
        )
        turns = [
            {"role": "system", "content": "You are an AI robot and your name is Lucy."},
            {
                "role": "user",
                "content": text,
                "wavpath": f"/mnt/QA_1450K_question_tar_16khz/question_shuf_part_8/wav/{question}",
            },
            {
                "role": "assistant",
                "content": f"好的，{text}。",
                "wavpath": f"/mnt/QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3/wav/{answer}",
                "speaker": "F10",
            },
        ]
        conversations.append({"conversations": turns})
    tar(source / "QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3.tar", answers)
    write(source / "train.json", json.dumps(conversations, ensure_ascii=False))
    return {"datasets/jsonl/VITA-MLLM/AudioQA-1M/data.jsonl": (2, DAMAGED)}


SPOKEN_QA: dict[str, Callable[[Path], Expected]] = {
    "gpt-omni/VoiceAssistant-400K": voice_assistant,
    "VITA-MLLM/AudioQA-1M": audioqa,
}
