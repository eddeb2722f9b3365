"""Who makes an episode of a take: an expert that demonstrates, or a recorded demonstration that is replayed."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv, num_init_states
from spvla.benchmarks.libero.experts import Demonstration, demonstrate
from spvla.benchmarks.libero.placements import Start
from spvla.benchmarks.libero.starts import drawn_start, initial_start, settle
from spvla.data.demos import Film, asking, drop_noops, read_demo, replay
from spvla.errors import DatasetError, InfrastructureError, SpvlaError
from spvla.types import Episode


class Recorder:
    """Holds the environment of the last task, since opening one takes longer than resetting it."""

    def __init__(self, assets: AssetSet) -> None:
        self.assets = assets
        self.env: LiberoEnv | None = None

    def record(self, suite: str, task: int, take: int) -> Episode | None:
        """The take-th episode of a task, or None where it is no success. A crash is an InfrastructureError."""
        try:
            return self.make(self.open(suite, task), take)
        except SpvlaError:
            raise
        except Exception as e:
            raise InfrastructureError(f"{suite} task {task}, take {take}: {type(e).__name__}: {e}") from e

    def make(self, env: LiberoEnv, take: int) -> Episode | None:
        raise NotImplementedError

    def open(self, suite: str, task: int) -> LiberoEnv:
        if self.env is None or (self.env.suite, self.env.task) != (suite, task):
            self.close()
            self.env = LiberoEnv(suite, task, self.assets)
        return self.env

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None


class Demonstrator(Recorder):
    """An expert demonstrates, with random habits of its own in each take, decided by the seed.

    Take k begins at a start drawn for it, or, with `test_starts`, at init state k, round and round. In a share of the
    takes what is carried out is noisy, and what is recorded is the expert's own answer to where that led.
    """

    def __init__(
        self, assets: AssetSet, *, seed: int, test_starts: bool = False, noise: float, noise_share: float
    ) -> None:
        super().__init__(assets)
        self.seed, self.test_starts, self.noise, self.noise_share = seed, test_starts, noise, noise_share

    def make(self, env: LiberoEnv, take: int) -> Episode | None:
        start, where = self.start(env, take)
        noise = self.noise if is_noisy(take, self.noise_share) else 0.0
        found = demonstrate(env, start, np.random.default_rng([self.seed, env.task, take]), noise=noise)
        demonstration = without_noops(env, start, found) if found else None
        if demonstration is None:
            return None
        source = f"{env.task_name}, expert, {where}, seed {self.seed}, take {take}, noise {noise:g}"
        return filmed(env, demonstration, source=source)

    def start(self, env: LiberoEnv, take: int) -> tuple[Start, str]:
        if not self.test_starts:
            return drawn_start(env, seed=self.seed, take=take), "drawn start"
        init_state = take % num_init_states(env.suite, env.task)
        return initial_start(env, init_state), f"init state {init_state}"


def is_noisy(take: int, share: float) -> bool:
    """Of any first n takes, floor(share n) are."""
    return int((take + 1) * share + 1e-9) > int(take * share + 1e-9)


def without_noops(env: LiberoEnv, start: Start, found: Demonstration) -> Demonstration | None:
    """Leaves out the steps whose action asks nothing; None where that no longer solves the task.

    What follows a step that was left out is simulated anew. A disturbed demonstration cannot be, since its actions
    are not those that were carried out: it only loses these steps.
    """
    kept = asking(found.actions)
    if kept.all():
        return found
    if not np.array_equal(found.actions, found.played):
        views = [view for view, keep in zip(found.views, kept, strict=True) if keep]
        return replace(found, actions=found.actions[kept], played=found.played[kept], views=views)
    env.begin(start)
    settle(env)
    views, solved = [], False
    for action in found.actions[kept]:
        views.append(env.sample.keep())
        solved = env.step(action)
    return replace(found, actions=found.actions[kept], played=found.actions[kept], views=views) if solved else None


def filmed(env: LiberoEnv, demonstration: Demonstration, *, source: str) -> Episode:
    """Draws what the sensors showed before each action. Nothing is simulated."""
    film = Film()
    for view in demonstration.views:
        env.sample.show(view)
        film.take(env)
    return film.episode(demonstration.actions, instruction=env.instruction, source=source)


class Replayer(Recorder):
    """Take k is demo_k of the task's HDF5 file, played in the world of the task's k-th episode."""

    def __init__(self, assets: AssetSet, *, files: dict[int, Path]) -> None:
        super().__init__(assets)
        self.files = files

    def make(self, env: LiberoEnv, take: int) -> Episode | None:
        demo = read_demo(self.files[env.task], take)
        size = 1 + env.model.nq + env.model.nv
        if demo.state.shape != (size,):
            raise DatasetError(
                f"{demo.source} has states of {demo.state.size} numbers",
                expected=f"{size}, as {env.task_name} has",
                remedy="Give the folder of this suite's own demonstrations.",
            )
        env.reset_to(demo.state, episode=take)
        settle(env)
        return replay(env, drop_noops(demo.actions), source=demo.source)
