"""What the package alone must do: acting with a checkpoint takes none of the extras."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spvla

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What an extra's packages are imported as, where that is another name.
IMPORTED_AS = {"tensorflow-datasets": "tensorflow_datasets", "PyOpenGL": "OpenGL"}


def packages(requirements: list[str]) -> set[str]:
    names = [re.split(r"[\[<>=]", requirement)[0] for requirement in requirements]
    return {IMPORTED_AS.get(name, name) for name in names}


EXTRAS = PROJECT["optional-dependencies"]
ABSENT = {"libero", "robosuite", "bddl"}.union(*(packages(EXTRAS[e]) for e in ("sim", "train", "wandb", "quantized")))


def run_without(absent: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """A module that is None in sys.modules is one that Python does not find."""
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({sorted(absent)!r}))\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, timeout=120)


def test_a_checkpoint_acts_without_the_extras() -> None:
    code = """
import numpy as np, spvla
from spvla.policies.openvla.images import evaluation_image
policy = spvla.load_policy("tiny")
image = evaluation_image(np.zeros((256, 256, 3), np.uint8), center_crop=True)
seen = spvla.Observation(images=(image,), instruction="put the bowl on the plate")
try:
    policy.act([seen], unnorm_key="libero_spatial")
except spvla.errors.UserError as e:
    print(e)
"""
    done = run_without(ABSENT, code)
    assert "no action statistics" in done.stdout, done.stderr  # a preset has none: it was asked, and said so


@pytest.mark.parametrize("args", [["--help"], ["evaluate", "--help"], ["train", "--help"], ["serve", "--help"]])
def test_help_is_there_without_the_extras(args: list[str]) -> None:
    done = run_without(ABSENT, f"from spvla import cli\ncli.main({args})")
    assert done.returncode == 0, done.stderr
    assert "usage: spvla" in done.stdout


def test_a_command_says_which_extras_it_misses() -> None:
    done = run_without({"ray"}, "from spvla import cli\ncli.main(['evaluate', '--pretrained_checkpoint', 'tiny'])")
    assert done.returncode == 2
    assert "without the package ray" in done.stderr
    assert "pip install 'spvla[sim,train]'" in done.stderr


def test_a_package_of_the_extras_is_no_requirement_of_the_whole() -> None:
    assert not packages(PROJECT["dependencies"]) & ABSENT


def test_each_requirement_is_pinned_in_the_lock() -> None:
    lock = {re.split(r"==", line)[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").open()}
    wanted = [r for e, requirements in EXTRAS.items() if e != "hopper" for r in requirements] + PROJECT["dependencies"]
    names = {re.split(r"[\[<>=]", r)[0].lower().replace("_", "-") for r in wanted}
    assert names - lock == {"torch"}  # torch's pin is in the Makefile: its build brings its own CUDA libraries


@pytest.mark.parametrize("name", spvla.__all__)
def test_what_the_package_exports_is_documented(name: str) -> None:
    exported = getattr(spvla, name)
    assert exported.__doc__
    assert not exported.__doc__.startswith(name + "("), "a dataclass's own signature is no docstring"


def test_the_type_checker_may_read_the_package() -> None:
    assert (Path(spvla.__file__).parent / "py.typed").exists()
    assert (
        "py.typed"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["spvla"]
    )
