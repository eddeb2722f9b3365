"""LIBERO's tasks behind the Env seam: silent, repeatable, and clear about what is wrong."""

import os
import pdb
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mujoco
import numpy as np
import pytest

from spvla.benchmarks.libero import stock
from spvla.benchmarks.libero.assets import AssetSet, read_by_scenes, resolve
from spvla.benchmarks.libero.env import SUITES, LiberoEnv, num_init_states, task_info, tasks
from spvla.benchmarks.libero.sampling import SensorClock
from spvla.errors import InfrastructureError, UserError
from spvla.types import Env

WAIT = np.array([0.0, 0, 0, 0, 0, 0, -1])


@pytest.fixture(scope="module")
def assets() -> AssetSet:
    return resolve()


@pytest.fixture(scope="module")
def env(assets: AssetSet) -> Iterator[LiberoEnv]:
    with LiberoEnv("libero_goal", 7, assets) as env:
        yield env


def everything(env: LiberoEnv) -> dict[str, np.ndarray]:
    """All that the next step depends on: MuJoCo's integration state, the model's changeable parts, the controller."""
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    model = {name: getattr(env.model, name).copy() for name in ("body_pos", "body_quat", "site_rgba")}
    controller = {k: v.copy() for k, v in vars(env.controller).items() if isinstance(v, np.ndarray) and k[0] != "_"}
    controller.pop("grip_step", None)  # set anew by every action
    clock = np.array([env.clock.since_s, env.clock.sampled])
    return {"state": state, **model, **controller, "clock": clock}


def test_each_suite_has_its_tasks_with_fifty_init_states() -> None:
    assert {suite: len(tasks(suite)) for suite in SUITES} == {s: 90 if s == "libero_90" else 10 for s in SUITES}
    for suite in SUITES:
        assert num_init_states(suite, 0) == num_init_states(suite, 9) == 50


@pytest.mark.parametrize(
    ("suite", "task", "instruction"),
    [
        ("libero_object", 0, "pick up the alphabet soup and place it in the basket"),
        (
            "libero_spatial",
            4,
            "pick up the black bowl in the top drawer of the wooden cabinet and place it on the plate",
        ),
        ("libero_10", 9, "put the yellow and white mug in the microwave and close it"),
        ("libero_90", 0, "close the top drawer of the cabinet"),  # KITCHEN_SCENE10, two digits
    ],
)
def test_instructions_are_those_the_original_evaluates_with(suite: str, task: int, instruction: str) -> None:
    assert task_info(suite, task).instruction == instruction


def test_listing_tasks_imports_neither_libero_nor_torch() -> None:
    script = "import sys; from spvla.benchmarks.libero.suites import tasks; tasks('libero_10'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"libero", "robosuite", "mujoco", "torch"} & set(loaded)


def test_unknown_names_are_refused_with_what_exists() -> None:
    with pytest.raises(UserError, match="expected one of libero_spatial, libero_object"):
        tasks("libero_objects")
    with pytest.raises(UserError, match="task 10 of libero_object; expected 0 to 9"):
        task_info("libero_object", 10)


def test_init_states_outside_the_file_are_refused(env: LiberoEnv) -> None:
    with pytest.raises(UserError, match="init state 50 of libero_goal task 7; expected 0 to 49"):
        env.reset(50)


def test_it_keeps_the_contract_of_an_env(env: LiberoEnv) -> None:
    seam: Env = env
    seam.reset(0)
    assert seam.step(WAIT) is False
    image, (state, joints) = seam.image(), seam.proprio()
    assert image.shape == (256, 256, 3) and image.dtype == np.uint8 and image.std() > 10
    assert (state.shape, joints.shape, state.dtype, joints.dtype) == ((8,), (7,), np.float32, np.float32)
    assert len(seam.state_digest()) == 64


def test_a_reset_leaves_nothing_of_the_trials_before(env: LiberoEnv) -> None:
    env.reset(3)
    fresh = everything(env)
    rng = np.random.default_rng(0)
    for trial in (7, 0):
        env.reset(trial)
        for _ in range(10):
            env.step(rng.uniform(-1, 1, 7))
    stove = env.env.fixtures_dict["flat_stove_1"]
    env.data.joint(stove.joints[0]).qpos[0] = 1.5  # the knob, turned: the burner glows and the task is solved
    mujoco.mj_forward(env.model, env.data)
    assert env.step(WAIT) is True
    env.reset(3)
    again = everything(env)
    assert [name for name in fresh if not np.array_equal(fresh[name], again[name])] == []


def test_a_trial_repeats_to_the_bit_in_another_environment(env: LiberoEnv, assets: AssetSet) -> None:
    def digests(env: LiberoEnv) -> list[str]:
        env.reset(5)
        return [env.state_digest() for _ in range(5) if env.step(np.array([0.3, -0.2, -0.5, 0, 0.1, 0, 1])) is False]

    with LiberoEnv("libero_goal", 7, assets) as other:
        assert digests(env) == digests(other)


def test_pictures_wait_until_someone_looks(env: LiberoEnv) -> None:
    """Looking changes nothing, and looking late shows what looking at once would have shown."""
    env.reset(2)
    for _ in range(3):
        env.step(WAIT)
    first, wrist, again = env.image(), env.image("robot0_eye_in_hand"), env.image()
    assert np.array_equal(first, again) and not np.array_equal(first, wrist)
    unseen = env.state_digest()
    env.reset(2)
    for _ in range(3):
        env.step(WAIT)
        env.image()
    assert env.state_digest() == unseen


def test_a_moment_is_drawn_later_as_it_was_and_leaves_the_present_alone(env: LiberoEnv) -> None:
    env.reset(2)
    kept = []
    for action in (WAIT, 0.8 * np.ones(7), -np.ones(7)):
        env.step(action)
        kept.append((env.moment(), env.image(), env.image("robot0_eye_in_hand")))
    env.reset(3)
    now, digest = env.image(), env.state_digest()
    for moment, main, wrist in kept:
        assert np.array_equal(env.image_at(moment), main)
        assert np.array_equal(env.image_at(moment, "robot0_eye_in_hand"), wrist)
    assert np.array_equal(env.image(), now) and env.state_digest() == digest


def test_the_sensors_sample_just_before_a_control_step_ends() -> None:
    """By hand: 4 ms ahead after a reset, so period ends fall at substep 23 and the next sample at substep 24."""
    clock = SensorClock()
    assert [substep for substep in range(1, 26) if clock.tick()] == [24]


def test_start_and_end_are_silent_ask_nothing_and_write_only_to_the_cache(tmp_path: Path, assets: AssetSet) -> None:
    script = f"""
from pathlib import Path
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv
env = LiberoEnv("libero_object", 0, AssetSet(name="given", path=Path({str(assets.path)!r}), digest=""))
env.reset(0)
env.image()
"""  # not closed: the interpreter's end must be silent too
    home, cache, work = tmp_path / "home", tmp_path / "cache", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
    root = Path(__file__).resolve().parents[2]
    environ = {**os.environ, "HOME": str(home), "SPVLA_CACHE": str(cache), "PYTHONPATH": str(root)}
    environ.pop("LIBERO_CONFIG_PATH", None)
    log = Path("/tmp/robosuite.log")
    written = log.stat().st_mtime_ns if log.exists() else None
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=work,
        env=environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    outside = [f for f in [*home.rglob("*"), *work.rglob("*")] if f.is_file() and "mesa_shader_cache" not in str(f)]
    assert outside == []  # Mesa's driver caches its shaders where it likes
    assert (cache / "libero-config/config.yaml").is_file()
    assert (log.stat().st_mtime_ns if log.exists() else None) == written


def close_in_time(assets: AssetSet, count: int) -> None:
    envs = [LiberoEnv("libero_object", 0, assets) for _ in range(count)]
    for env in envs:
        env.reset(0)
        env.image()
    started = time.monotonic()
    for env in envs:
        env.close()
        env.close()
    assert time.monotonic() - started < count * 5 / 20


def test_closing_is_quick_and_may_be_repeated(assets: AssetSet) -> None:
    close_in_time(assets, 3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_closing_twenty_environments_takes_less_than_five_seconds(assets: AssetSet) -> None:
    close_in_time(assets, 20)


def test_a_scene_without_room_ends_as_a_fault_instead_of_a_loop(
    assets: AssetSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LIBERO's own reset would try for ever, and its sampler for sites would wait in a debugger."""

    def no_room(*args: object) -> None:
        pdb.set_trace()
        raise stock.RandomizationError("Cannot place all objects ):")

    with LiberoEnv("libero_object", 0, assets) as env:
        monkeypatch.setattr(env.env.placement_initializer, "sample", no_room)
        with pytest.raises(InfrastructureError, match="no room for its objects in 100 resets"):
            env.reset(0)


def test_a_step_takes_seven_numbers(env: LiberoEnv) -> None:
    env.reset(0)
    with pytest.raises(AssertionError):
        env.step(np.zeros(4))


def assert_counted(files: Iterator[str | None], assets: AssetSet) -> None:
    """Those of an asset set among `files` are known to its digest, and there is one."""
    normal = {Path(os.path.normpath(file)) for file in files if file}
    theirs = {str(file.relative_to(assets.path)) for file in normal if file.is_relative_to(assets.path)}
    assert theirs and theirs <= read_by_scenes(assets.path)


def test_every_file_of_liberos_objects_is_in_the_digest(real_assets: AssetSet) -> None:
    from libero.libero.envs.base_object import OBJECTS_DICT

    stock.use_assets(real_assets.path)
    for model in {model for suite in SUITES for task in tasks(suite) for model in task.models}:
        described = OBJECTS_DICT[model]()
        assert_counted(iter([described.file, *(n.get("file") for n in described.asset)]), real_assets)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [("libero_object", 0), ("libero_goal", 0), ("libero_90", 0), ("libero_90", 60), ("libero_90", 80)],
)
def test_every_file_of_liberos_rooms_is_in_the_digest(suite: str, task: int, real_assets: AssetSet) -> None:
    problem = stock.build_problem(task_info(suite, task).bddl_file, real_assets.path)
    nodes = ElementTree.fromstring(problem.model.get_xml()).findall("./asset/*[@file]")
    assert_counted((node.get("file") for node in nodes), real_assets)


def load_step_and_draw(suite: str, assets: AssetSet) -> None:
    for task in tasks(suite):
        with LiberoEnv(suite, task.id, assets) as env:
            for number in (0, 49):
                env.reset(number)
                assert env.step(WAIT) is False
            assert env.image().std() > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suite", [s for s in SUITES if s != "libero_90"])
def test_all_forty_tasks_load_step_and_draw(suite: str, assets: AssetSet) -> None:
    load_step_and_draw(suite, assets)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suite", SUITES)
def test_all_tasks_load_step_and_draw_with_real_assets(suite: str, real_assets: AssetSet) -> None:
    load_step_and_draw(suite, real_assets)
