"""The farm on real Ray, its worlds being fakes: exactly once whatever dies, and the same whatever the load."""

import asyncio
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from fakes import FakeEnv, FakePolicy
from farm_parts import PROTOCOL, VERSION, adapter_of, fake_farm, job, open_ledger, tiny_with_statistics, trials

from spvla.config import FarmConfig
from spvla.errors import InfrastructureError
from spvla.eval.actors import PolicyServer, open_base
from spvla.eval.driver import Driver
from spvla.eval.messages import PolicyVersion, ServerSettings
from spvla.eval.plan import describe
from spvla.eval.pool import ActorPool
from spvla.policies.registry import Description
from spvla.types import Needs, Observation, Outcome, Status

pytestmark = pytest.mark.usefixtures("ray_cluster")
MARKS = "SPVLA_TEST_MARKS"  # folder where a fake notes what it has done once


def quiet(**flags: object) -> FarmConfig:
    return FarmConfig(**({"num_envs": 2, "num_videos": 0, "max_failure_videos": 0, "call_timeout_s": 20} | flags))


def once(name: str) -> bool:
    """True the first time, over all processes."""
    mark = Path(os.environ[MARKS]) / name
    new = not mark.exists()
    mark.touch()
    return new


@pytest.fixture
def marks(tmp_path: Path) -> str:
    (tmp_path / "marks").mkdir()
    return str(tmp_path / "marks")


def test_every_trial_is_played_and_comes_out_as_it_must(tmp_path: Path) -> None:
    wanted = trials(tasks=2, init_states=3)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, quiet()) as (farm, _):
        Driver(farm, job(wanted), ledger).play()
        rows = ledger.trials()
    assert [r.status for r in rows] == ["success"] * 6
    # steps of 0.2 from -0.01 i until x > 1 + task
    assert [r.steps for r in rows] == [6, 6, 6, 11, 11, 11]
    assert {r.worker for r in rows} <= {"env-0", "env-1"}


def test_a_chunk_is_executed_before_its_policy_is_asked_again(tmp_path: Path) -> None:
    needs = Needs(cameras=("agentview", "robot0_eye_in_hand"), proprio=True, chunk=8, execute=4)
    version = replace(VERSION, description=Description(family="fake", needs=needs))
    wanted = trials(tasks=2, init_states=2)
    farm_of = fake_farm(tmp_path, quiet(num_envs=1), versions=[version])
    with open_ledger(tmp_path, wanted) as ledger, farm_of as (farm, _):
        driver = Driver(farm, job(wanted, needs=needs), ledger)
        driver.play()
        assert [r.steps for r in ledger.trials()] == [6, 6, 11, 11]
        (server,) = farm.servers.ready()
        stats = ray.get(server.actor.stats.remote())
    assert (stats.requests, stats.actions) == (2 + 2 + 3 + 3, 4 * 10)


def test_death_by_any_signal_is_an_error_and_the_trial_is_played_elsewhere(tmp_path: Path, marks: str) -> None:
    wanted = trials(tasks=1, init_states=6)
    signals = [signal.SIGKILL, signal.SIGFPE, signal.SIGSEGV, signal.SIGSTOP]

    class Deadly(FakeEnv):
        def reset(self, init_state: int) -> None:
            super().reset(init_state)
            if init_state < 4 and once(str(init_state)):
                os.kill(os.getpid(), signals[init_state])

    def env(suite: str, task: int) -> FakeEnv:
        os.environ[MARKS] = marks
        return Deadly()

    config = quiet(call_timeout_s=8)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config, open_env=env) as (farm, _):
        Driver(farm, job(wanted), ledger).play()
        assert [r.status for r in ledger.trials()] == ["success"] * 6
        errors = {e.init_state: e for e in ledger.errors()}
    assert sorted(errors) == [0, 1, 2, 3]
    assert [errors[i].kind for i in range(4)] == ["environment died"] * 3 + ["hang"]
    assert "Floating point" in errors[1].message and "Segmentation" in errors[2].message
    assert "reset" in errors[1].traceback  # where it happened


def test_an_exception_is_given_up_after_its_retries_and_is_no_failure(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=3)

    class Raising(FakeEnv):
        def reset(self, init_state: int) -> None:
            super().reset(init_state)
            if init_state == 1:
                raise RuntimeError("the cabinet fell over")

    def env(suite: str, task: int) -> FakeEnv:
        return Raising()

    config = quiet(max_retries=2)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config, open_env=env) as (farm, said):
        driver = Driver(farm, job(wanted), ledger)
        driver.play()
        assert [(r.status, r.errors) for r in ledger.trials()] == [("success", 0), (None, 3), ("success", 0)]
        assert driver.scheduler.given_up == [wanted[1]]
        assert all("the cabinet fell over" in e.message and "Traceback" in e.traceback for e in ledger.errors())
        assert len({e.worker for e in ledger.errors()}) == 2  # tried elsewhere
    assert any("given up" in line for line in said)


def test_an_action_that_is_no_number_is_the_policys_failure(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=1)

    def policy(version: object, settings: object) -> FakePolicy:
        return FakePolicy(speed=float("nan"))

    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, quiet(), load=policy) as (farm, _):
        Driver(farm, job(wanted), ledger).play()
        (row,) = ledger.trials()
    assert (row.status, row.note, row.errors) == ("failure", "NaN action at step 0", 0)


def test_a_policy_actor_that_dies_or_raises_is_replaced(tmp_path: Path, marks: str) -> None:
    wanted = trials(tasks=1, init_states=6)

    class Frail(FakePolicy):
        def act(self, observations: list[Observation], **rest: object) -> np.ndarray:
            brightness = observations[0].images[0].mean()
            if brightness > 150 and once("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            if brightness > 180 and once("raised"):
                raise RuntimeError("CUDA error")
            return super().act(observations, **rest)

    def policy(version: object, settings: object) -> FakePolicy:
        os.environ[MARKS] = marks
        return Frail(speed=0.2)

    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, quiet(), load=policy) as (farm, _):
        Driver(farm, job(wanted), ledger).play()
        assert [r.status for r in ledger.trials()] == ["success"] * 6
        kinds = {e.kind for e in ledger.errors()}
    assert kinds == {"policy actor gone", "policy actor raised"}
    assert sorted(os.listdir(marks)) == ["killed", "raised"]


def test_a_farm_whose_workers_only_die_says_why_and_where_the_logs_are(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=4)

    class Doomed(FakeEnv):
        def reset(self, init_state: int) -> None:
            os.kill(os.getpid(), signal.SIGSEGV)

    def env(suite: str, task: int) -> FakeEnv:
        return Doomed()

    config = quiet(num_envs=1, max_retries=100)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config, open_env=env) as (farm, _):
        with pytest.raises(InfrastructureError, match=r"5 times in a row.*Segmentation fault.*workers"):
            Driver(farm, job(wanted), ledger).play()
        assert ledger.claim(PROTOCOL.digest, wanted[0])  # nothing is left claimed


def test_a_worker_that_grows_too_large_is_replaced_between_trials(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=3)
    config = quiet(num_envs=1, worker_memory_gb=0.01)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config) as (farm, said):
        Driver(farm, job(wanted), ledger).play()
        assert [(r.status, r.errors) for r in ledger.trials()] == [("success", 0)] * 3
    assert sum("replaced" in line for line in said) == 3


def test_a_disk_that_takes_no_video_costs_no_outcome(tmp_path: Path) -> None:
    (tmp_path / "videos").write_text("in the folder's place")
    wanted = trials(tasks=1, init_states=3)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, quiet(num_videos=1)) as (farm, said):
        Driver(farm, job(wanted), ledger).play()
        rows = ledger.trials()
    assert [(r.status, r.video) for r in rows] == [("success", "")] * 3
    assert any(line.startswith("no video of libero_object task 0") for line in said)


def test_a_machine_without_an_encoder_costs_no_outcome(tmp_path: Path) -> None:
    def env(suite: str, task: int) -> FakeEnv:
        from spvla.eval import actors

        def no_encoder(frames: list[np.ndarray]) -> bytes:
            raise ModuleNotFoundError("No module named 'imageio'")

        actors.encode_mp4 = no_encoder
        return FakeEnv()

    wanted = trials(tasks=1, init_states=3)
    with (
        open_ledger(tmp_path, wanted) as ledger,
        fake_farm(tmp_path, quiet(num_videos=1), open_env=env) as (farm, said),
    ):
        Driver(farm, job(wanted), ledger).play()
        rows = ledger.trials()
    assert [(r.status, r.video, r.errors) for r in rows] == [("success", "", 0)] * 3
    assert any("No module named 'imageio'" in line for line in said)


def test_trials_of_another_driver_are_left_to_it(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=4)
    theirs = Outcome(status=Status.FAILURE, steps=1, seconds=0.1, state_digest="theirs")
    with (
        open_ledger(tmp_path, wanted) as ledger,
        open_ledger(tmp_path, wanted) as other,
        fake_farm(tmp_path, quiet()) as (farm, _),
    ):
        assert other.claim(PROTOCOL.digest, wanted[0]) and other.claim(PROTOCOL.digest, wanted[1])

        def meanwhile(driver: Driver) -> None:
            if driver.made == 2:  # ours are done: one of theirs ends, the other is given back
                other.record(PROTOCOL.digest, wanted[0], theirs)
                other.release(PROTOCOL.digest, wanted[1])

        Driver(farm, job(wanted), ledger).play(meanwhile)
        rows = ledger.trials()
    assert [r.status for r in rows] == ["failure", "success", "success", "success"]
    assert rows[0].state_digest == "theirs"


def test_a_trial_whose_claim_lapsed_is_played_unless_the_other_driver_ends_it(tmp_path: Path) -> None:
    wanted = trials(tasks=1, init_states=1)

    class Slow(FakeEnv):
        def reset(self, init_state: int) -> None:
            super().reset(init_state)
            time.sleep(1)

    def env(suite: str, task: int) -> FakeEnv:
        return Slow()

    with (
        open_ledger(tmp_path, wanted) as ledger,
        open_ledger(tmp_path, wanted) as other,
        fake_farm(tmp_path, quiet(num_envs=1), open_env=env) as (farm, _),
    ):
        stolen = []

        def meanwhile(driver: Driver) -> None:
            if driver.running and not stolen:
                ledger.release(PROTOCOL.digest, wanted[0])  # as a heartbeat that stopped for a minute does
                stolen.append(other.claim(PROTOCOL.digest, wanted[0]))
            elif stolen and not driver.running:  # what its own worker made of it was refused
                other.release(PROTOCOL.digest, wanted[0])

        Driver(farm, job(wanted), ledger).play(meanwhile)
        assert stolen == [True]
        assert [r.status for r in ledger.trials()] == ["success"]


def test_a_pool_that_was_idle_for_long_is_not_without_a_place_the_moment_it_asks(ray_cluster: None) -> None:
    class Worker:
        pass

    nowhere = ray.remote(resources={"nowhere": 1})(Worker)
    pool = ActorPool("env", launch=lambda name: nowhere.remote(), start=lambda actor: actor, start_timeout_s=60)
    pool.grow_to(1)
    pool.placed_at_s -= 1000
    pool.fill(1)
    assert pool.waiting() and not pool.without_a_place(900)
    pool.placed_at_s -= 1000
    pool.fill(1)
    assert pool.without_a_place(900)
    pool.close()


def test_a_new_version_moves_its_adapter_and_leaves_the_base_where_it_is(tmp_path: Path) -> None:
    base = tiny_with_statistics(tmp_path / "tiny")
    first, second = (describe(str(adapter_of(base, tmp_path / f"step{seed}", seed=seed))) for seed in (1, 2))
    loaded: list[str] = []

    def load(version: PolicyVersion, settings: ServerSettings) -> object:
        loaded.append(version.base)
        return open_base(version, settings)

    async def follow(server: PolicyServer) -> None:
        files = {path.name: path.read_bytes() for path in Path(second.path).iterdir()}
        shutil.rmtree(second.path)  # as if on another machine
        held = {second.digest: [ray.put(files)]}
        await asyncio.gather(server.prepare([first], {}), server.prepare([second], held))  # the second does not wait

    options = {"device": "cpu", "dtype": "float32", "load_in_8bit": False, "load_in_4bit": False, "wait_ms": None}
    sizes = {"decode_batch_size": 1, "max_batch": 1, "under_way": 1}
    server = PolicyServer("policy-0", ServerSettings(**options, **sizes, instructions=(), log_folder=None, load=load))
    server.decoding = ThreadPoolExecutor(2)  # as with a GPU
    asyncio.run(follow(server))
    (policy,) = server.policies.values()
    assert loaded == [str(base)] and policy.adapters == [second.digest]


@pytest.mark.slow
def test_the_result_is_the_same_whatever_the_load(tmp_path: Path) -> None:
    """A real policy, three versions of it at once; 1, 2 and 5 workers, so other batches and another order each time."""
    base = tiny_with_statistics(tmp_path / "tiny")
    adapters = [adapter_of(base, tmp_path / f"adapter{seed}", seed=seed) for seed in (1, 2)]
    versions = [describe(str(p)) for p in (base, *adapters)]
    assert len({v.digest for v in versions}) == 3 and {v.base for v in versions} == {str(base)}
    wanted = trials(tasks=2, init_states=2, versions=versions)

    class Flicker(FakeEnv):
        """Every state looks different, and every part of an action moves it."""

        def image(self, camera: str = "agentview") -> np.ndarray:
            rng = np.random.default_rng(np.float64(self.x).view(np.uint64))
            return np.kron(rng.integers(0, 256, (16, 16, 3), np.uint8), np.ones((16, 16, 1), np.uint8))

        def step(self, action: np.ndarray) -> bool:
            self.x += float(action @ [1, 2, 3, 4, 5, 6, 7])
            return False

    def env(suite: str, task: int) -> FakeEnv:
        return Flicker()

    tables = []
    for num_envs in (1, 2, 5):
        folder, config = tmp_path / str(num_envs), quiet(num_envs=num_envs)
        farm_of = fake_farm(folder, config, open_env=env, load=open_base, versions=versions)
        with open_ledger(folder, wanted, versions) as ledger, farm_of as (farm, _):
            Driver(farm, job(wanted[:: -1 if num_envs == 2 else 1], "libero_object_no_noops", steps=8), ledger).play()
            tables.append([(r.trial, r.status, r.steps, r.state_digest) for r in ledger.trials()])
    assert tables[0] == tables[1] == tables[2]
    assert len({digest for *_, digest in tables[0]}) > 2  # two init states: so the versions do differ
