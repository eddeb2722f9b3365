"""LeRobot's own code opens what is exported here, and what it writes is indexed here. In a virtual environment of its
own, because it wants another torch, and torchvision."""

import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from data_parts import NAME, episode, index_here, store_of

from spvla.data import lerobot_export
from spvla.policies.openvla.images import decode_jpeg

pytestmark = pytest.mark.slow

PACKAGES = ("lerobot-dataset==0.4.4", "torch<2.11", "torchvision<0.26", "pandas")
KEYS = {"agentview": "observation.images.image", "robot0_eye_in_hand": "observation.images.image2"}

READ = """
import sys, numpy as np
from ledataset.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("local/copy", root=sys.argv[1], video_backend="pyav")
items = [data[i] for i in range(len(data))]
found = {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0] if key != "task"}
np.savez(sys.argv[2], task=[item["task"] for item in items], **found)
"""

WRITE = """
import sys, numpy as np
from ledataset.datasets.lerobot_dataset import LeRobotDataset
given = np.load(sys.argv[1])
names = ["height", "width", "channel"]
features = {key: {"dtype": "video", "shape": (256, 256, 3), "names": names} for key in given if "images" in key}
features |= {"observation.state": {"dtype": "float32", "shape": (8,), "names": None}}
features |= {"action": {"dtype": "float32", "shape": (7,), "names": None}}
data = LeRobotDataset.create("local/new", fps=10, features=features, root=sys.argv[2])
for i, (e, task) in enumerate(zip(given["episode"], given["task"])):
    data.add_frame({key: given[key][i] for key in features} | {"task": str(task)})
    if i + 1 == len(given["episode"]) or given["episode"][i + 1] != e:
        data.save_episode()
data.finalize()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with LeRobot's data set code."""
    folder = tmp_path_factory.mktemp("lerobot") / "venv"
    venv.create(folder, with_pip=True)
    install = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGES[0]} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    return str(folder / "bin/python")


def run(python: str, code: str, *arguments: Path) -> None:
    done = subprocess.run([python, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_lerobots_reader_finds_every_number_and_picture(python: str, tmp_path: Path) -> None:
    store = store_of(tmp_path / "data", [episode(i, steps=3 + i) for i in range(3)])
    folder = lerobot_export.export(store, tmp_path / "copy")
    run(python, READ, folder, tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    for key, values in lerobot_export.numbers_of(store).items():
        assert np.array_equal(found[key], values), key
    assert found["task"].tolist() == [store[i].instruction for i in range(len(store))]
    assert found["episode_index"].ravel().tolist() == store.episodes.tolist()
    for camera, key in KEYS.items():
        pictures = np.stack([decode_jpeg(store.jpeg(i, camera)) for i in range(len(store))]).transpose(0, 3, 1, 2)
        apart = np.abs(np.rint(found[key] * 255) - pictures)
        assert apart.mean() < 3  # its decoder takes ffmpeg's quicker way from YCbCr


def test_what_lerobot_writes_is_indexed(python: str, tmp_path: Path) -> None:
    store = store_of(tmp_path / "data", [episode(i, steps=5 + i) for i in range(2)])
    numbers = {k: v for k, v in lerobot_export.numbers_of(store).items() if k != "observation.joint_state"}
    pictures = {
        key: np.stack([decode_jpeg(store.jpeg(i, camera)) for i in range(len(store))]) for camera, key in KEYS.items()
    }
    tasks = [store[i].instruction for i in range(len(store))]
    np.savez(tmp_path / "given.npz", episode=store.episodes, task=tasks, **numbers, **pictures)
    run(python, WRITE, tmp_path / "given.npz", tmp_path / NAME)
    found = index_here(tmp_path)
    assert found.episode_lengths == store.episode_lengths and found.instructions == store.instructions
    assert np.array_equal(found.actions, store.actions) and np.array_equal(found.proprio, store.proprio)
    for camera, key in KEYS.items():
        back = np.stack([decode_jpeg(found.jpeg(i, camera)) for i in range(len(found))])
        assert np.abs(back.astype(int) - pictures[key]).mean() < 6  # its AV1 at crf 30
