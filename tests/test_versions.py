"""Which MuJoCo simulates: one, and one that published checkpoints know, unless somebody says that any will do."""

import importlib.metadata
from pathlib import Path

import pytest

from spvla import cli
from spvla.benchmarks.libero import versions
from spvla.errors import UserError


def put(folder: Path, version: str) -> Path:
    """A folder in which MuJoCo of that version is installed, as far as Python's path shows."""
    described = folder / f"mujoco-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mujoco\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    ("version", "known"),
    [
        *[(v, True) for v in ("3.2.7", "3.3.0", "3.3.2", "3.3.2.dev1")],
        *[(v, False) for v in ("3.2.6", "3.3.3", "3.4.0", "3.8.1", "3.10.0", "2.3.7", "4.0")],
    ],
)
def test_the_known_worlds_end_before_the_floor_was_darkened(version: str, known: bool) -> None:
    assert versions.is_known(version) is known


def test_the_installed_version_is_a_known_one_and_the_one_that_is_imported() -> None:
    assert versions.require_mujoco(any_version=False) == importlib.metadata.version("mujoco")


def test_two_versions_on_the_path_are_refused_with_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [put(tmp_path / "a", "3.8.1"), put(tmp_path / "b", "3.3.2")]
    monkeypatch.setattr("sys.path", [str(f) for f in folders])
    with pytest.raises(UserError, match=r"3\.8\.1 in .*/a, 3\.3\.2 in .*/b; expected one version"):
        versions.require_mujoco(any_version=True)


def test_one_version_that_is_found_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(put(tmp_path / name, "3.3.2")) for name in ("lib", "lib64")])
    assert versions.installed_mujoco() == "3.3.2"


@pytest.mark.parametrize("command", ["evaluate", "selfplay", "sweep"])
def test_every_command_that_evaluates_refuses_another_world_unless_told(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"evaluate": "--pretrained_checkpoint x", "selfplay": "", "sweep": "--beta 0.3,0.7"}[command]
    assert cli.parse([command, *line.split(), "--any_mujoco", "True"])[1].any_mujoco
    monkeypatch.setattr("sys.path", [str(put(tmp_path, "3.8.1"))])
    with pytest.raises(UserError, match=r"MuJoCo 3\.8\.1, .*; expected 3\.2\.7 to 3\.3\.2.*--any_mujoco True"):
        versions.require_mujoco(any_version=False)
    assert versions.require_mujoco(any_version=True) == "3.8.1"


def test_a_world_is_called_comparable_only_if_both_its_halves_are() -> None:
    assert versions.world("3.3.2", "libero").endswith("the world of LIBERO's demonstrations and published checkpoints.")
    for mujoco, assets in (("3.8.1", "libero"), ("3.3.2", "primitives"), ("3.3.2", "mine-0123456789ab")):
        said = versions.world(mujoco, assets)
        assert mujoco in said and said.endswith("these rates compare with each other, not with published ones.")


@pytest.mark.parametrize("line", ["collect", "demo"])
def test_a_command_that_simulates_says_in_one_line_that_there_are_two(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(put(tmp_path, "9.9.9"))
    assert cli.run([line]) == 2
    said = capsys.readouterr().err
    assert said.startswith("spvla: MuJoCo is on Python's path more than once: 9.9.9 in ") and said.count("\n") == 1
