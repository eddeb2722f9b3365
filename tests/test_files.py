"""Lists of paths, and what can be no path."""

import errno
import fcntl
from pathlib import Path

import pytest

from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.files import is_folder, locked, paths_in, require_writable


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
