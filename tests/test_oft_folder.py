"""Folders of OpenVLA-OFT: found by their files, read as tensors alone, written as they were read, refused when odd."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oft_parts import STATS, create_oft, observations, reference_oft_model
from safetensors.torch import load_file

from spvla.errors import CheckpointError, UserError
from spvla.files import write_json
from spvla.model.weights import SINGLE
from spvla.policies import packed
from spvla.policies.oft.checkpoint import open_model, save_checkpoint
from spvla.policies.oft.folder import form_of, form_to_train
from spvla.policies.oft.form import OftForm
from spvla.policies.oft.parts import find_part
from spvla.policies.openvla.actions import gripper_to_env
from spvla.policies.openvla.images import evaluation_image
from spvla.policies.presets import create_preset
from spvla.policies.registry import NO_FLAGS, PolicyFlags, describe, load_policy
from spvla.types import Observation

FORM = OftForm(cameras=2, proprio=True, head="l1")
HEAD, PROJECTOR = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the original publishes it: no marker, the head in bfloat16, the projector in float32."""
    folder = create_oft(tmp_path_factory.mktemp("oft") / "base", FORM)
    config = json.loads((folder / "config.json").read_text())
    del config["spvla"]
    write_json(folder / "config.json", config)
    for part, name in (("action_head", HEAD), ("proprio_projector", PROJECTOR)):
        path = find_part(folder, part)
        state = torch.load(path, weights_only=True)
        torch.save({k: t.bfloat16() if name == HEAD else t for k, t in state.items()}, folder / name)
        path.unlink()
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """A checkpoint to break: everything but the large weights, which are linked."""
    ignored = shutil.ignore_patterns(SINGLE)
    folder = Path(shutil.copytree(published, tmp_path / "copy", ignore=ignored))
    (folder / SINGLE).symlink_to(published / SINGLE)
    return folder


def test_a_published_folder_is_known_by_its_files(published: Path) -> None:
    assert form_of(published) == FORM  # two images: what was published; a flag may say one
    assert form_of(published, PolicyFlags(num_images_in_input=1)).cameras == 1
    said = describe(published, PolicyFlags(use_l1_regression=True, use_proprio=True, num_open_loop_steps=4))
    assert said.family == "oft" and (said.needs.chunk, said.needs.execute) == (8, 4)


@pytest.mark.parametrize(
    ("flags", "got"),
    [
        ({"use_l1_regression": False}, "--use_l1_regression False"),
        ({"use_proprio": False}, "--use_proprio False"),
        ({"num_open_loop_steps": 9}, "--num_open_loop_steps 9"),
        ({"num_open_loop_steps": 0}, "--num_open_loop_steps 0"),
    ],
)
def test_flags_that_say_otherwise_than_the_folder_are_refused(published: Path, flags: dict[str, Any], got: str) -> None:
    with pytest.raises(UserError, match=got):
        describe(published, PolicyFlags(**flags))


def test_a_folder_with_a_marker_knows_its_cameras(tmp_path: Path) -> None:
    folder = create_oft(tmp_path / "base", OftForm(cameras=2, action_tokens_only=True))
    assert describe(folder).needs.cameras == ("agentview", "robot0_eye_in_hand")
    with pytest.raises(UserError, match="--num_images_in_input 1 .* expected 2"):
        describe(folder, PolicyFlags(num_images_in_input=1))


def test_tokens_alone_are_plain_openvla_until_a_flag_asks_for_chunks(copy: Path) -> None:
    (copy / HEAD).unlink()
    (copy / PROJECTOR).unlink()
    assert form_of(copy) is None
    assert form_of(copy, PolicyFlags(use_l1_regression=False, num_images_in_input=1)) is None
    assert form_of(copy, PolicyFlags(num_open_loop_steps=8)) == OftForm()
    assert form_of(copy, PolicyFlags(num_images_in_input=2)) == OftForm(cameras=2)
    assert form_to_train(copy, NO_FLAGS) is None
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", config | {"spvla": {"family": "oft", "action_tokens_only": True}})
    assert form_of(copy) == OftForm(action_tokens_only=True)
    write_json(copy / "config.json", config)
    assert form_to_train(copy, PolicyFlags(use_l1_regression=True, use_proprio=True)) == OftForm(
        proprio=True, head="l1"
    )


def test_saving_gives_back_what_was_read(published: Path, tmp_path: Path) -> None:
    model = open_model(published, FORM)
    save_checkpoint(model, tmp_path / "saved", source=published, norm_stats=STATS)
    assert form_of(tmp_path / "saved") == FORM
    before, after = (load_file(folder / SINGLE) for folder in (published, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    for part in ("action_head", "proprio_projector"):
        read, written = (
            torch.load(find_part(folder, part), weights_only=True) for folder in (published, tmp_path / "saved")
        )
        assert read.keys() == written.keys() and all(torch.equal(read[n].float(), written[n]) for n in read)


@pytest.fixture
def originals(golden: Path, tmp_path: Path) -> Path:
    """The original's tiny OFT checkpoint: its plain folder with the three files that its fine-tuning adds."""
    folder = Path(shutil.copytree(golden / "model", tmp_path / "oft", ignore=shutil.ignore_patterns("*.npz")))
    folder.chmod(0o755)
    for f in (golden / "oft/pt").iterdir():
        (folder / f.name).unlink(missing_ok=True)
        shutil.copyfile(f, folder / f.name)
    return folder


def test_the_originals_own_files_hold_the_reference_weights(golden: Path, originals: Path) -> None:
    form = form_of(originals)
    assert form == FORM and describe(originals).needs.proprio
    model, expected = open_model(originals, form), reference_oft_model(form)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    keys = {"module." + n for part in model.added().values() for n in part.state_dict()}
    lines = (golden / "oft/pt_keys.txt").read_text().splitlines()
    assert {line.split()[1] for line in lines} == keys


def test_from_camera_frames_to_the_environments_actions_as_the_original(golden: Path, originals: Path) -> None:
    data = np.load(golden / "oft/l1.npz")
    frames = [data[f"e2e_{camera}_image"] for camera in ("agentview", "robot0_eye_in_hand")]
    seen = Observation(
        images=tuple(evaluation_image(frame, center_crop=True) for frame in frames),
        instruction=str(data["e2e_instruction"]),
        proprio=data["e2e_state"],
    )
    (chunk,) = load_policy(originals).act([seen], unnorm_key="libero_spatial_no_noops")
    assert np.abs(chunk - data["e2e_actions"]).max() <= 1e-4 * np.abs(data["e2e_actions"]).max()
    sent = gripper_to_env(chunk)
    assert np.allclose(sent, data["e2e_env_actions"], atol=1e-4)
    assert np.array_equal(sent[:, 6], data["e2e_env_actions"][:, 6])


@pytest.mark.parametrize(
    "names", [("agentview", "full_image", "full_cropped"), ("wrist", "wrist_image", "wrist_cropped")]
)
def test_a_cameras_frames_are_the_originals_to_the_bit(golden: Path, names: tuple[str, str, str]) -> None:
    data = np.load(golden / "oft/image.npz")
    for i in range(3):
        frame, plain, cropped = (data[f"{name}{i}"] for name in names)
        assert np.array_equal(evaluation_image(frame, center_crop=False), plain)
        assert np.array_equal(evaluation_image(frame, center_crop=True), cropped)


def break_head(copy: Path, value: Any) -> None:
    torch.save(value, copy / HEAD)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ({"module.model.fc1.weight": [1.0]}, "something else than tensors"),
        ([torch.zeros(1)], "something else than tensors"),
        ({"module.model.fc1.weight": Path("x")}, "more than tensors"),
        ({"module.model.fc1.weight": torch.zeros(96, 5)}, "holds model"),
    ],
)
def test_a_pt_file_with_anything_but_the_heads_tensors_is_refused(copy: Path, value: Any, got: str) -> None:
    break_head(copy, value)
    with pytest.raises(CheckpointError, match=got):
        open_model(copy, FORM)


def test_half_a_file_nan_and_two_heads_are_refused(copy: Path) -> None:
    state = torch.load(copy / HEAD, weights_only=True)
    break_head(copy, state | {"module.model.fc2.bias": torch.full((7,), torch.nan)})
    with pytest.raises(CheckpointError, match="finite"):
        open_model(copy, FORM)
    whole = (copy / PROJECTOR).read_bytes()
    (copy / PROJECTOR).write_bytes(whole[: len(whole) // 2])
    break_head(copy, state)
    with pytest.raises(CheckpointError, match="half a file"):
        open_model(copy, FORM)
    shutil.copyfile(copy / HEAD, copy / "action_head--latest_checkpoint.pt")
    with pytest.raises(CheckpointError, match="2 files of action_head"):
        describe(copy)


def test_statistics_without_proprio_are_told_before_anything_is_loaded(copy: Path) -> None:
    for proprio in ({}, {"q01": [0.0] * 7, "q99": [0.0] * 7}):
        write_json(copy / "dataset_statistics.json", {"suite": STATS["suite"] | {"proprio": proprio}})
        with pytest.raises(UserError, match="without proprio"):
            describe(copy)


def test_a_config_that_contradicts_the_files_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", config | {"spvla": OftForm(cameras=2).to_json()})
    with pytest.raises(CheckpointError, match="with action_head, proprio_projector"):
        describe(copy)
    write_json(copy / "config.json", config | {"spvla": FORM.to_json() | {"chunk": 40}})
    with pytest.raises(CheckpointError, match="chunk of 1 to 36"):
        describe(copy)


def test_film_and_diffusion_are_not_played_as_something_else(copy: Path) -> None:
    (copy / "vision_backbone--150000_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match="FiLM"):
        describe(copy)


def test_a_policy_of_chunks_travels_packed(tmp_path: Path) -> None:
    """Its projector and its form with it; what it answers stays what it was in bfloat16."""
    folder = create_preset(tmp_path / "whole", "tiny-oft")
    write_json(folder / "dataset_statistics.json", STATS)
    (tmp_path / "back").mkdir()
    packed.unpack(packed.pack(folder, tmp_path / "packed"), tmp_path / "back")
    assert form_of(tmp_path / "back") == form_of(folder)
    seen = observations(2)
    before, after = (
        load_policy(f, dtype="bfloat16").decode(seen, unnorm_key="suite") for f in (folder, tmp_path / "back")
    )
    assert (before == after).all()
