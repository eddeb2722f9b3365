"""Init states are read; code hidden in a file is not run."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spvla.benchmarks.libero.init_states import init_states, load_init_states
from spvla.errors import UserError


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def archive(path: Path, payload: bytes) -> Path:
    """As torch.save writes it."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", payload)
        z.writestr("archive/version", "3\n")
    return path


def test_libero_files_hold_time_positions_and_velocities() -> None:
    states = init_states("libero_object", 0)
    assert states.shape == (50, 110) and states.dtype == np.float64
    assert np.isfinite(states).all()
    assert np.allclose(np.linalg.norm(states[:, 10 + 3 : 10 + 7], axis=1), 1)  # the first object's quaternion


def test_they_equal_what_torch_reads() -> None:
    torch = pytest.importorskip("torch")
    from spvla.benchmarks.libero.suites import task_info

    file = task_info("libero_10", 4).init_file
    assert np.array_equal(load_init_states(file), torch.load(file, weights_only=False))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_kinds_of_file_are_read(tmp_path: Path, protocol: int, zipped: bool) -> None:
    states = np.arange(12.0).reshape(3, 4)
    payload, file = pickle.dumps(states, protocol=protocol), tmp_path / "states"
    file = archive(file, payload) if zipped else file
    if not zipped:
        file.write_bytes(payload)
    assert np.array_equal(load_init_states(file), states)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_refused_and_the_code_not_run(tmp_path: Path, zipped: bool) -> None:
    target, file = tmp_path / "pwned", tmp_path / "states"
    payload = pickle.dumps([np.zeros(3), Hostile(target)])
    if zipped:
        archive(file, payload)
    else:
        file.write_bytes(payload)
    with pytest.raises(UserError, match="is refused"):
        load_init_states(file)
    assert not target.exists()


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("a list", pickle.dumps([1.0, 2.0])),
        ("objects", pickle.dumps(np.array([{}, []], dtype=object))),
        ("one row", pickle.dumps(np.zeros(5))),
        ("a torso", pickle.dumps(np.zeros((5, 5)))[:60]),
        ("nothing", b""),
        ("noise", b"\x00\xffhello"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, what: str, content: bytes) -> None:
    file = tmp_path / "states"
    file.write_bytes(content)
    with pytest.raises(UserError, match="init state file .* is refused"):
        load_init_states(file)


def test_an_archive_without_states_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "states", "w") as z:
        z.writestr("readme", "hello")
    with pytest.raises(UserError, match="is refused"):
        load_init_states(tmp_path / "states")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone is missing"):
        load_init_states(tmp_path / "gone")
