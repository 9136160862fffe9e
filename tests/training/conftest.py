"""A world small enough to train in seconds: a tiny Qwen2, a text-only mix, the real stage scripts."""

import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "tests/goldens/data/tokenizer/glm4voice"
STAGES = REPOSITORY / "scripts/deepspeed/sts_qwen25"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class TinyWorld:
    """Folders of a run, and a way to start its stages."""

    root: Path
    port: int = field(default_factory=_free_port)

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHON": sys.executable,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "DATASET_NAME": str(self.root / "mix.yaml"),
            "DATA_ROOT": str(self.root),
            "OUTPUT_ROOT": str(self.root / "out"),
            "AUDIO_TOKENIZER_PATH": str(self.root / "no_codec_needed_for_text"),
            "DEEPSPEED_CONFIG": str(REPOSITORY / "configs/quickstart/ds_config_zero2.json"),
            "BF16": "False",
            "GRADIENT_ACCUMULATION_STEPS": "1",
            "DATALOADER_NUM_WORKERS": "0",
            "MAX_STEPS": "4",
            "LEARNING_RATE": "1e-3",
            # The published schedule spends the first two updates at rate 0, half of these runs.
            "LR_SCHEDULER_TYPE": "cosine_with_min_lr",
            "REPORT_TO": "none",
            "MASTER_PORT": str(self.port),
            **settings,
        }

    def run_stage(self, name: str, *flags: str, **settings: str) -> subprocess.CompletedProcess:
        """Run one stage script to its end, from a folder that is not the repository."""
        return subprocess.run(
            ["bash", str(STAGES / f"finetune_glm4voice_{name}.sh"), "128", "run", *flags],
            cwd=self.root,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )

    def options(self, output_dir: Path, **options: object) -> list[str]:
        """The command line of a small run on the CPU, without a launcher; None leaves an option out."""
        defaults = {
            "model_name_or_path": self.root / "base",
            "dataset_name": self.root / "mix.yaml",
            "audio_tokenizer_type": "glm4voice",
            "model_max_length": 128,
            "output_dir": output_dir,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
        }
        flags: list[str] = []
        for name, value in {**defaults, **options}.items():
            if value is not None:
                values = value if isinstance(value, list) else [value]
                flags += [f"--{name}", *map(str, values)]
        return flags

    def launch(self, processes: int, *command: object, **settings: str) -> subprocess.CompletedProcess:
        """Run a command under our launcher, to its end."""
        launcher = [sys.executable, REPOSITORY / "vita_audio/cli/launch.py", "--standalone"]
        return subprocess.run(
            [str(part) for part in (*launcher, "--nproc_per_node", processes, *command)],
            cwd=self.root,
            env={**self.environment(**settings), "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=540,
            check=False,
        )

    def result(self, name: str) -> Path:
        return self.root / "out" / f"finetune_glm4voice_{name}" / "run"

    def losses(self, name: str) -> list[dict[str, float]]:
        return self.logged(self.result(name))

    @staticmethod
    def logged(folder: Path) -> list[dict[str, float]]:
        """The log lines of all steps, without what a clock measured."""
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [
            {
                name: value
                for name, value in line.items()
                if not name.startswith(("speed/", "data/wait_share"))
            }
            for line in history
            if "loss" in line
        ]


class Processes:
    """What runs on this machine."""

    @staticmethod
    def children(process: int) -> list[str]:
        try:
            return Path(f"/proc/{process}/task/{process}/children").read_text().split()
        except OSError:
            return []

    @staticmethod
    def of(folder: Path) -> list[str]:
        """Processes with the folder in their command line."""
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(folder).encode() in file.read_bytes():
                    found.append(file.parent.name)
            except OSError:
                continue
        return found

    @staticmethod
    def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture(scope="session")
def processes() -> Processes:
    return Processes()


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory) -> TinyWorld:
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("world")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(root / "base")
    config = Qwen2Config(
        vocab_size=688,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    Qwen2ForCausalLM(config).save_pretrained(root / "base")
    draw, words = random.Random(0), "zero one two three four five six seven eight nine".split()
    with open(root / "text.jsonl", "w") as file:
        for _ in range(200):
            text = " ".join(draw.choices(words, k=draw.randint(1, 8)))
            messages = [{"role": "user", "content": f"say {text}"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")
    (root / "mix.yaml").write_text("dataset:\n  text:\n    ratio: 1.0\n    data_paths:\n      - text.jsonl\n")
    return TinyWorld(root)


@dataclass
class Call:
    """One call of a stage script, up to the launch of its processes."""

    status: int
    words: list[str]
    environment: dict[str, str]
    printed: str

    @property
    def launcher(self) -> list[str]:
        return self.words[: self._program()]

    @property
    def flags(self) -> list[str]:
        return self.words[self._program() + 1 :]

    def value(self, flag: str) -> str:
        """What follows a flag where it is given last."""
        last = len(self.words) - 1 - self.words[::-1].index(flag)
        return self.words[last + 1]

    def _program(self) -> int:
        return next(i for i, word in enumerate(self.words) if word.endswith("tools/finetune_sts.py"))


class StandIns:
    """Calls stage scripts in a clean environment, with stand-ins for the GPUs and for Python.

    Nothing is trained: the stand-in for Python notes its arguments and its environment.

    Args:
        root: ROOT_PATH of all calls; the folders that stages look for are made in it, empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tools = root / "stand_ins"
        self._tools.mkdir()
        for folder in ("models/Qwen/Qwen2.5-7B-Instruct", "models/FunAudioLLM/SenseVoiceSmall"):
            (root / folder).mkdir(parents=True)

    def call(
        self,
        name: str | Path,
        *words: str,
        gpus: int = 8,
        typed_in: Path | None = None,
        without: tuple[str, ...] = (),
        **settings: str,
    ) -> Call:
        """Call a script by its name or path.

        Args:
            words: its arguments.
            gpus: how many the machine has.
            typed_in: the working folder.
            without: variables that are not set, ROOT_PATH for one.
            settings: variables that are.
        """
        listed = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(gpus))
        self._write("nvidia-smi", listed)
        noted = self.root / "noted"
        self._write("python", f"printf '%s\\0' \"$@\" >{noted}.words\nenv -0 >{noted}.environment\n")
        words_file, environment_file = Path(f"{noted}.words"), Path(f"{noted}.environment")
        words_file.unlink(missing_ok=True)
        environment = {
            "PATH": f"{self._tools}:/usr/local/bin:/usr/bin:/bin",
            "ROOT_PATH": str(self.root),
            **settings,
        }
        run = subprocess.run(
            ["bash", str(name if Path(name).is_absolute() or typed_in else STAGES / f"{name}.sh"), *words],
            cwd=typed_in or self.root,
            env={name: value for name, value in environment.items() if name not in without},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if not words_file.is_file():
            return Call(run.returncode, [], {}, run.stdout + run.stderr)
        entries = environment_file.read_text().split("\0")
        return Call(
            run.returncode,
            words_file.read_text().split("\0")[:-1],
            dict(entry.split("=", 1) for entry in entries if "=" in entry),
            run.stdout + run.stderr,
        )

    def _write(self, tool: str, body: str) -> None:
        (self._tools / tool).write_text(f"#!/bin/sh\n{body}")
        (self._tools / tool).chmod(0o755)


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path)


OWNER = """
import sys, time
from vita_audio.training.run_folder import RunFolder
with RunFolder(sys.argv[1]) as folder:
    folder.lock()
    print("locked", flush=True)
    time.sleep(600)
"""


@contextmanager
def _owned_by_another_process(folder: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout.readline() == "locked\n"
            yield owner
        finally:
            owner.kill()


@pytest.fixture
def owned_by_another_process():
    """A context in which another process has locked a run's folder; killed at its end."""
    return _owned_by_another_process
