"""The reference of LIBERO's settled tasks, and what is said where this machine's are others. Numbers by hand."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from spvla import doctor
from spvla.benchmarks.libero import world_check
from spvla.benchmarks.libero.world import (
    INIT_STATES,
    SIDE,
    SUITES,
    Difference,
    Place,
    Snapshot,
    difference,
    load,
    save,
    shrink,
)
from spvla.benchmarks.libero.world_check import Machine
from spvla.config import DoctorConfig
from spvla.errors import InfrastructureError

HERE = Machine(mujoco="3.3.2", assets="libero", renderer="Mesa llvmpipe")
MOVED, DARKER = Difference(mm=22.7, body="akita_black_bowl_1_main", levels=2), Difference(mm=0.0, body="", levels=33)
SAME = Difference(mm=2e-7, body="plate_1_main", levels=1)


def snapshot(x: float = 0.0, level: int = 100) -> Snapshot:
    frame = np.full((SIDE, SIDE, 3), level, np.uint8)
    return Snapshot(bodies=("plate", "bowl"), xpos=np.array([[0, 0, 0.9], [x, 0.2, 0.9]]), frame=frame)


def test_the_package_carries_all_forty_tasks_in_some_init_states_each() -> None:
    reference = load()
    assert set(reference) == {(suite, task) for suite in SUITES for task in range(10)}
    for of_task in reference.values():
        assert len(of_task) == len(INIT_STATES) >= 2
        assert all(len(s.bodies) == len(s.xpos) >= 1 and s.frame.std() > 10 for s in of_task)
        assert not np.array_equal(of_task[0].xpos, of_task[1].xpos)


def test_a_reference_is_read_as_it_was_written(tmp_path) -> None:
    reference = load()
    save(tmp_path / "again.npz", reference)
    for place, of_task in load(tmp_path / "again.npz").items():
        for a, b in zip(of_task, reference[place], strict=True):
            assert a.bodies == b.bodies and np.array_equal(a.xpos, b.xpos) and np.array_equal(a.frame, b.frame)


def test_a_shrunk_frames_pixel_is_the_mean_of_those_that_it_covers() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2, 0] = [[10, 20], [30, 40]]
    image[2:, 2:] = 7
    assert shrink(image, 2).tolist() == [[[25, 0, 0], [0, 0, 0]], [[0, 0, 0], [7, 7, 7]]]


def test_the_body_that_lies_farthest_off_is_named_in_millimetres() -> None:
    found = difference([snapshot(), snapshot(x=0.003)], [snapshot(), snapshot(level=133)])
    assert (round(found.mm, 9), found.body, found.levels) == (3.0, "bowl", 33)
    assert str(found) == "bowl lies 3.0 mm off, its picture is 33 levels off"


def test_rounding_is_no_difference() -> None:
    found = difference([snapshot(x=2e-7, level=102)], [snapshot()])
    assert not found.moved and not found.recoloured


def test_a_body_that_is_not_there_is_infinitely_far_away() -> None:
    found = difference([replace(snapshot(), bodies=("plate", "cup"))], [snapshot()])
    assert found.moved and found.mm == np.inf and found.body == "bowl"


@pytest.mark.parametrize(
    ("here", "found", "what", "remedy"),
    [
        ({"mujoco": "3.8.1"}, MOVED, "MuJoCo 3.8.1", "pip install mujoco==3.3.2"),
        ({"mujoco": "3.8.1", "assets": "primitives"}, DARKER, "MuJoCo 3.8.1", "pip install mujoco==3.3.2"),
        ({"assets": "primitives"}, MOVED, "the primitives assets", "make setup"),
        ({}, MOVED, "packages that compute otherwise", "requirements.lock"),
        ({"renderer": "NVIDIA H200"}, DARKER, "the renderer, NVIDIA H200", "llvmpipe"),
    ],
)
def test_the_likeliest_cause_has_its_remedy(here: dict, found: Difference, what: str, remedy: str) -> None:
    cause = replace(HERE, **here).cause(found)
    assert cause.what.startswith(what) and remedy in cause.remedy


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[Place, Difference]:
    """This one, with an installed MuJoCo of 3.8.1 and, as its forty tasks are played, these differences."""
    found = dict.fromkeys(load(), SAME)

    def check(assets: object) -> Iterator[tuple[Place, Difference]]:
        yield from reversed(found.items())

    monkeypatch.setattr(world_check, "check", check)
    monkeypatch.setattr("spvla.benchmarks.libero.versions.installed_mujoco", lambda: "3.8.1")
    monkeypatch.setattr(doctor, "try_drawing", lambda: "Mesa llvmpipe")
    return found


def test_doctor_says_which_tasks_differ_in_one_line_each_and_ends_in_an_error(
    machine: dict[Place, Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    machine["libero_spatial", 5], machine["libero_object", 0] = MOVED, DARKER
    with pytest.raises(InfrastructureError, match="2 of 40 tasks are not as in stock LIBERO"):
        doctor.doctor(DoctorConfig(world=True))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1:] == [
        "gap libero_object task 0: its picture is 33 levels off; likely MuJoCo 3.8.1",
        "gap libero_spatial task 5: akita_black_bowl_1 lies 22.7 mm off; likely MuJoCo 3.8.1",
        "    -> MuJoCo 3.8.1: run `pip install mujoco==3.3.2`",
    ]
    assert "world  40/40 tasks" in printed.err and "differ 2" in printed.err


def test_doctor_says_so_where_nothing_differs(
    machine: dict[Place, Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.doctor(DoctorConfig(world=True))
    assert capsys.readouterr().out.splitlines()[1:] == ["ok  all 40 tasks lie and look as in stock LIBERO"]
