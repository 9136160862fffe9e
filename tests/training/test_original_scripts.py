"""The eight stage scripts of the published code, rebuilt from what is known of them, run against our tools.

Only paths, sizes (of the small world, of a step, of the loader) and the number of steps differ from the published ones,
which ``test_published_values.py`` covers. The scripts source our
``set_env_ds_gpu.sh`` and call ``torchrun`` with ``tools/finetune_sts_v4_48_3.py`` and all of the published flags. Here
``torchrun`` notes how it was called, and each call then runs as the one process of its launch, forked from a process
that has imported everything already: eight stages in the time of a few.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDENS = REPOSITORY / "tests/goldens"
FAMILIES = ("glm4voice", "sensevoice_glm4voice")


@dataclass(frozen=True)
class Stage:
    name: str
    heads: int
    rate: str
    decay: str
    mix: str
    deepspeed: str
    flags: str = ""
    before: str | None = None


FROZEN = "--language-model-freeze --audio-model-freeze"
STAGES = (
    Stage("stage1", 0, "6.00e-5", "0.0", "stage1", "zero2", "--audio-model-freeze"),
    Stage(
        "mtp1_stage1",
        1,
        "1.00e-3",
        "0.0",
        "stage1",
        "zero2",
        "--language-model-freeze --audio-model-freeze",
        "stage1",
    ),
    Stage("mtp10_stage1", 10, "1.00e-3", "0.0", "stage1", "zero2", FROZEN, "mtp1_stage1"),
    Stage(
        "mtp10_stage2",
        10,
        "5.00e-5",
        "0.1",
        "stage2",
        "zero2_no_optimizer",
        "--audio-model-freeze --mtp_model_lr_mult 1.00e1",
        "mtp10_stage1",
    ),
)

SCRIPT = r"""#!/bin/bash
set -e
export ROOT_PATH={root}
export LOCAL_ROOT_PATH={root}/scratch
export CODE_PATH={repository}
mkdir -p ${{LOCAL_ROOT_PATH}}
cd ${{LOCAL_ROOT_PATH}}
ln -sfn ${{ROOT_PATH}}/data datasets

SEQ_LENGTH="$1"
if [ -z "$SEQ_LENGTH" ]; then SEQ_LENGTH=32768; fi
timestamp="$2"
if [ -z "$timestamp" ]; then timestamp=$(date +%Y%m%d_%H); fi

source ${{CODE_PATH}}/scripts/set_env_ds_gpu.sh

OUTPUT_DIR=${{ROOT_PATH}}/output/LM/{script}/${{timestamp}}
mkdir -p ${{OUTPUT_DIR}}
exec &> >(tee ${{OUTPUT_DIR}}/log_node${{NODE_RANK}}.txt)
DATA_PATH=${{ROOT_PATH}}/mix_{mix}.yaml
cp ${{DATA_PATH}} ${{OUTPUT_DIR}}/

torchrun --nproc_per_node ${{NPROC_PER_NODE}} --nnodes ${{NNODES}} --node_rank ${{NODE_RANK}} \
  --master_addr ${{MASTER_ADDR}} --master_port ${{MASTER_PORT}} \
  ${{CODE_PATH}}/tools/finetune_sts_v4_48_3.py \
  --log_level info --do_train --overwrite_output_dir \
  --config_name ${{ROOT_PATH}}/config_mtp{heads}.json \
  --tokenizer_name {start} \
  --model_name_or_path {start} \
  --audio_tokenizer_path ${{ROOT_PATH}}/models/THUDM/glm-4-voice-tokenizer \
  --audio_tokenizer_type {family} \
  --dataset_name ${{DATA_PATH}} \
  --bf16 True --tf32 True --torch_dtype bfloat16 \
  --output_dir ${{OUTPUT_DIR}} \
  --num_train_epochs 1 --max_steps 2 \
  --per_device_train_batch_size 1 --per_device_eval_batch_size 1 --gradient_accumulation_steps 2 \
  --save_strategy "steps" --save_steps 0.1 --save_total_limit 2 \
  --learning_rate {rate} --max_grad_norm 1.0 --weight_decay {decay} \
  --adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-8 \
  --warmup_ratio 0.03 --lr_scheduler_type "cosine" \
  --logging_steps 1 --report_to "tensorboard" \
  --model_max_length ${{SEQ_LENGTH}} \
  --gradient_checkpointing True \
  --deepspeed ${{CODE_PATH}}/scripts/deepspeed/ds_config_{deepspeed}.json \
  --trust_remote_code False \
  --ddp_timeout 7200 --ddp_backend nccl \
  --attn_implementation flash_attention_2 \
  --seed 42 --data_seed 42 \
  --reset_attention_mask --reset_position_ids --create_attention_mask false --create_attention_mask_2d false \
  --dataloader_num_workers 1 \
  {flags} --text-audio-interval-ratio 1 10 4 10
"""

DRIVER = """
import os, runpy, sys, time, traceback
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(out, 1)
os.dup2(out, 2)
sys.argv = command
# What Python does for a script: its folder is searched for modules.
sys.path.insert(0, os.path.dirname(command[0]))
runpy.run_path(command[0], run_name="__main__")
"""


class World:
    """ROOT_PATH of the runs, and the processes that run them."""

    def __init__(
        self, root: Path, base: Path, text: Path, processes: multiprocessing.context.BaseContext
    ) -> None:
        self.root = root
        self._processes = processes
        (root / "data/jsonl").mkdir(parents=True)
        (root / "data/jsonl/text.jsonl").write_text(text.read_text())
        mix = "dataset:\n  text:\n    ratio: 1.0\n    data_paths:\n      - datasets/jsonl/text.jsonl\n"
        for stage in ("stage1", "stage2"):
            (root / f"mix_{stage}.yaml").write_text(f"{mix}xlsx_sample_num: 5\n")
        (root / "models/FunAudioLLM").mkdir(parents=True)
        (root / "models/FunAudioLLM/SenseVoiceSmall").symlink_to(GOLDENS / "sensevoice")
        for family in FAMILIES:
            shutil.copytree(base, root / "models/Qwen" / family)
            shutil.copytree(
                GOLDENS / "data/tokenizer" / family, root / "models/Qwen" / family, dirs_exist_ok=True
            )
        config = json.loads((base / "config.json").read_text())
        for heads in (0, 1, 10):
            more = {
                "num_nextn_predict_layers": heads,
                "num_hidden_layers": config["num_hidden_layers"] + heads,
            }
            (root / f"config_mtp{heads}.json").write_text(json.dumps(config | more))
        self._venv = root / "venv"
        self._make_environment()

    def _make_environment(self) -> None:
        """An environment in which set_env_ds_gpu.sh installs nothing, and a stand-in for torchrun."""
        commands = self._venv / "bin"
        commands.mkdir(parents=True)
        (commands / "activate").write_text(f"export PATH={commands}:$PATH\n")
        note = f"printf '%s\\0' \"$@\" >{self.root}/called.words\nenv -0 >{self.root}/called.environment\n"
        for name, body in {"python": "", "torchrun": note}.items():
            (commands / name).write_text(f"#!/bin/sh\n{body}")
            (commands / name).chmod(0o755)
        (self._venv / ".cluster").touch()

    def folder(self, family: str, stage: str) -> Path:
        return self.root / "output/LM/scripts/deepspeed/sts_qwen25" / f"finetune_{family}_{stage}.sh" / "run"

    def run(self, family: str, stage: Stage) -> str:
        """Run a script, then what it called; everything that was printed, or an error."""
        script = f"scripts/deepspeed/sts_qwen25/finetune_{family}_{stage.name}.sh"
        start = self.folder(family, stage.before) if stage.before else self.root / "models/Qwen" / family
        text = SCRIPT.format(
            root=self.root,
            repository=REPOSITORY,
            script=script,
            family=family,
            start=start,
            **vars(stage),
        )
        file = self.root / Path(script).name
        file.write_text(text)
        cluster = {"NPROC_PER_NODE": "1", "WORLD_SIZE": "1", "RANK": "0"}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.root), "VENV": str(self._venv), **cluster}
        subprocess.run(["bash", str(file), "128", "run"], env=environment, check=True, timeout=60)
        words = (self.root / "called.words").read_text().split("\0")[:-1]
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        launched = " ".join(words[:place])
        assert launched == (
            "--nproc_per_node 1 --nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 34567"
        )
        entries = (self.root / "called.environment").read_text().split("\0")
        exported = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        return self._become(words[place:], exported, self.root / f"{family}_{stage.name}.log")

    def _become(self, command: list[str], environment: dict[str, str], log: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {
            **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(REPOSITORY),
            # CPUs are chosen: the tool takes gloo, sdpa and PyTorch's Adam, and says so.
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": str(self.root / "arrow"),
        }
        driver = self.root / "driver.py"
        driver.write_text(DRIVER)
        given = {
            "command": command,
            "environment": environment,
            "folder": str(self.root / "scratch"),
            "log": str(log),
        }
        process = self._processes.Process(target=runpy.run_path, args=(str(driver), given))
        process.start()
        process.join(timeout=300)
        assert process.exitcode == 0, log.read_text()[-3000:]
        return log.read_text()


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["deepspeed", "vita_audio.cli.finetune", "tensorboard"])
    return World(
        tmp_path_factory.mktemp("original"),
        tiny_world.root / "base",
        tiny_world.root / "text.jsonl",
        processes,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_scripts_run_their_four_stages(world, family):
    for stage in STAGES:
        printed = world.run(family, stage)
        folder = world.folder(family, stage.name)
        assert (folder / "stage.complete").is_file(), stage.name
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        config = json.loads((folder / "config.json").read_text())
        assert config.get("num_nextn_predict_layers", 0) == stage.heads
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {str(weights.get_slice(name).get_dtype()) for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "gloo instead of nccl" in printed
        assert "sdpa instead of flash_attention_2" in printed
        assert (folder / "log_node0.txt").is_file()
