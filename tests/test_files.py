"""Lists of paths, what can be no path, and what a file system may refuse."""

import errno
import fcntl
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from spvla.cli import COMMANDS, run
from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.files import cache_dir, discard, expanded, is_folder, locked, new_folder, paths_in, require_writable


def test_a_comma_in_a_folders_name_belongs_to_it(tmp_path: Path) -> None:
    tuned = tmp_path / "trial_lr=0.1,rank=8,seed=1"
    (tuned / "checkpoints").mkdir(parents=True)
    plain = tmp_path / "plain"
    assert paths_in(f"{tuned}/checkpoints,{plain}") == [f"{tuned}/checkpoints", str(plain)]
    assert paths_in(f"{plain},{tuned},{tuned}/checkpoints") == [str(plain), str(tuned), f"{tuned}/checkpoints"]
    assert paths_in("a/b,c/d,") == ["a/b", "c/d"] and paths_in("") == []


def test_a_comparison_needs_two_paths_and_not_one_comma(tmp_path: Path) -> None:
    (two := tmp_path / "a,b").mkdir()
    EvaluateConfig(pretrained_checkpoint=f"{two},openvla/openvla-7b", stop_when_settled=True).check()


def test_the_home_of_nobody_is_no_folder_to_write_to() -> None:
    with pytest.raises(UserError, match="--run_root_dir ~nosuch/x; expected a user who exists"):
        require_writable(Path("~nosuch/x"), flag="--run_root_dir")


PATH_FLAGS = [
    (command, field.name)
    for command, (cls, _) in COMMANDS.items()
    if command != "sweep"  # its training flags are those of train
    for field in fields(cls)
    if field.type in (Path, Path | None)
]


@pytest.mark.parametrize(("command", "flag"), [*PATH_FLAGS, ("sweep", "data_root_dir"), ("sweep", "run_root_dir")])
def test_every_flag_that_names_a_place_refuses_the_home_of_nobody(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cls, _ = COMMANDS[command]
    needed = {f.name: "here" for f in fields(cls) if f.default is MISSING and f.type is Path} | {flag: "~nosuch/x"}
    assert run([command, *(word for name, value in needed.items() for word in (f"--{name}", value))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{flag} ~nosuch/x; expected a user who exists after ~" in line


def test_the_home_of_nobody_holds_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", "--pretrained_checkpoint", "~nosuch/x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "~nosuch/x" in line


def test_the_cache_may_be_named_from_home_and_not_from_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SPVLA_CACHE", "~/cache")  # as a YAML file's env_vars leave it
    assert cache_dir() == tmp_path.resolve() / "cache"
    monkeypatch.setenv("SPVLA_CACHE", "~nosuch/x")
    with pytest.raises(UserError, match="SPVLA_CACHE ~nosuch/x; expected a user who exists"):
        cache_dir()


def test_a_circle_of_links_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="no circle of links"):
        expanded(tmp_path / "a", flag="--demos")


def test_a_folder_that_cannot_be_renamed_is_replaced_and_removed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As overlayfs answers for a folder of a container's image."""
    rename = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "data":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    (folder := tmp_path / "data").mkdir()
    (folder / "old").touch()
    with new_folder(folder) as new:
        (new / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "new"]
    discard(folder)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_held_once_and_where_there_are_no_locks_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"expected": "one", "remedy": "Wait."}
    with (
        locked(tmp_path, **how),
        pytest.raises(UserError, match="is being written by process"),
        locked(tmp_path, **how),
    ):
        raise AssertionError("held twice")

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with locked(tmp_path, **how), locked(tmp_path, **how):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_what_can_be_no_path_is_no_folder(tmp_path: Path) -> None:
    assert is_folder(tmp_path)
    assert not any(map(is_folder, (Path("x" * 5000), Path("a\0b"), tmp_path / "none")))
