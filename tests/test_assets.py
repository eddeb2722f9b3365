"""Which assets are used, and that results can tell them apart."""

from pathlib import Path

import pytest

from spvla.benchmarks.libero import assets, suites
from spvla.benchmarks.libero.assets import FOLDERS, resolve
from spvla.errors import UserError


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no assets of LIBERO's."""
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_libero_places", lambda: [tmp_path / "none"])


def asset_folder(path: Path, content: str = "<mujoco/>") -> Path:
    for name in FOLDERS:
        (path / name).mkdir(parents=True)
    (path / "scenes/table.xml").write_text(content)
    return path


def test_a_flag_goes_before_the_variable_before_liberos_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag, variable, own = (asset_folder(tmp_path / name) for name in ("flag", "variable", "own"))
    monkeypatch.setattr(assets, "_libero_places", lambda: [tmp_path / "none", own])
    monkeypatch.setenv("LIBERO_ASSETS", str(variable))
    assert resolve(flag).path == flag
    assert resolve().path == variable
    monkeypatch.delenv("LIBERO_ASSETS")
    assert (resolve().path, resolve().name) == (own, "libero")


def test_the_primitives_are_written_once_where_nothing_else_is(nowhere: None, tmp_path: Path) -> None:
    first = resolve()
    assert first.name == "primitives" and first.path.parent == tmp_path / "cache/assets"
    assert all((first.path / name).is_dir() for name in FOLDERS)
    (first.path / "mark").touch()
    assert resolve() == first and (first.path / "mark").exists()


def test_a_folder_without_assets_is_refused_by_the_name_it_was_given_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="--libero_assets .* has no articulated_objects/"):
        resolve(tmp_path)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="LIBERO_ASSETS .*gone has no"):
        resolve()


def test_the_digest_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    one, same, other = (
        asset_folder(tmp_path / name, content).resolve()
        for name, content in (("one", "<mujoco/>"), ("same", "<mujoco/>"), ("other", "<mujoco />"))
    )
    assert resolve(one).digest == resolve(same).digest != resolve(other).digest
    (same / "scenes/table.xml").rename(same / "scenes/desk.xml")
    assert resolve(one).digest != resolve(same).digest


def test_real_assets_are_recognised(real_assets: Path) -> None:
    assert resolve(real_assets).name == real_assets.name


def test_folders_that_are_links_count_with_their_content(tmp_path: Path) -> None:
    digests = set()
    for content in ("<mujoco/>", "<mujoco />"):
        real, linked = asset_folder(tmp_path / f"real{len(content)}", content), tmp_path / f"linked{len(content)}"
        linked.mkdir()
        for name in FOLDERS:
            (linked / name).symlink_to(real / name)
        assert resolve(linked).digest == resolve(real).digest
        digests.add(resolve(linked).digest)
    assert len(digests) == 2


def test_the_primitives_have_every_model_of_the_four_suites_and_name_those_of_libero_90_that_they_lack() -> None:
    own = assets._primitives()
    own.require(task for suite in suites.SUITES if suite != "libero_90" for task in suites.tasks(suite))
    own.require([suites.task_info("libero_90", 0)])
    with pytest.raises(UserError, match="libero_90 task 86 needs .*, which the primitives assets lack"):
        own.require(suites.tasks("libero_90")[86:])
