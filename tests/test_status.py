"""How commands end, how loud they are, and what `spvla clean` takes away. (`spvla status`: test_report.py.)"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spvla import cli
from spvla.config import CleanConfig
from spvla.data import frames
from spvla.doctor import Finding, assets, clean, found_by
from spvla.errors import TrainingError, UserError
from spvla.files import cache_dir

DOCS = Path(__file__).resolve().parent.parent / "docs"


def ending(error: BaseException | None) -> Callable[[Any], None]:
    def command(config: Any) -> None:
        if error is not None:
            raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (None, 0, ""),
        (
            TrainingError("the loss is not finite; logs are in RUN"),
            1,
            "spvla: the loss is not finite; logs are in RUN\n",
        ),
        (UserError("--x 1", expected="2", remedy="Give 2."), 2, "spvla: --x 1; expected 2. Give 2.\n"),
        (KeyboardInterrupt(), 130, "spvla: interrupted; the same command goes on from here\n"),
    ],
)
def test_each_way_to_end_has_its_documented_exit_code(
    error: BaseException | None,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "entry_point", lambda name: ending(error))
    assert cli.run(["clean"]) == code
    assert capsys.readouterr().err == says
    documented = re.findall(r"^\| (\d+) \|", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert str(code) in documented


def test_more_is_said_of_a_failure_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "entry_point", lambda name: ending(TrainingError("no")))
    assert cli.run(["clean", "-v"]) == 1
    assert "Traceback" in (said := capsys.readouterr().err) and "raise error" in said


def test_clean_removes_the_cache_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(frames, "SHARED_MEMORY", tmp_path / "shm")
    for folder in frames.own_folders():
        folder.mkdir(parents=True)
        (folder / "decoded.u8").write_bytes(b"")
    (tmp_path / "cache" / "assets").mkdir(parents=True)
    (tmp_path / "cache" / "assets" / "mesh").write_bytes(b"x" * 2**20)
    (tmp_path / "runs").mkdir()
    (tmp_path / "cache" / "mine").write_text("not of this project")
    clean(CleanConfig())
    assert (tmp_path / "cache" / "assets" / "mesh").exists()
    assert "1.0 MiB" in capsys.readouterr().out
    clean(CleanConfig(yes=True))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["cache", "mine", "runs", "shm"]


def test_an_empty_cache_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPVLA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == Path.home() / ".cache/spvla"


def test_doctor_goes_on_past_a_folder_that_holds_no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_ASSETS", "/nonexistent")
    assert "LIBERO_ASSETS /nonexistent has no" in found_by(assets).found


def test_doctor_goes_on_past_what_nobody_thought_of() -> None:
    def weather() -> Finding:
        raise RuntimeError("no sky")

    assert found_by(weather).found == "cannot be looked at (RuntimeError: no sky)" and found_by(weather).remedy
