"""Who makes an episode of a take: an expert that demonstrates, or a recorded demonstration that is replayed."""

from pathlib import Path

import numpy as np

from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.env import LiberoEnv, num_init_states
from spvla.benchmarks.libero.experts import SETTLE, SETTLING_STEPS, demonstrate
from spvla.data.demos import drop_noops, read_demo, replay
from spvla.errors import DatasetError, InfrastructureError, SpvlaError
from spvla.types import Episode


class Recorder:
    """Holds the environment of the last task, since opening one takes longer than resetting it."""

    def __init__(self, suite: str, assets: AssetSet) -> None:
        self.suite, self.assets = suite, assets
        self.env: LiberoEnv | None = None

    def record(self, task: int, take: int) -> Episode | None:
        """The take-th episode of a task, or None where it is no success. A crash is an InfrastructureError."""
        try:
            return self.make(self.open(task), task, take)
        except SpvlaError:
            raise
        except Exception as e:
            raise InfrastructureError(f"{self.suite} task {task}, take {take}: {type(e).__name__}: {e}") from e

    def make(self, env: LiberoEnv, task: int, take: int) -> Episode | None:
        raise NotImplementedError

    def open(self, task: int) -> LiberoEnv:
        if self.env is None or self.env.task != task:
            self.close()
            self.env = LiberoEnv(self.suite, task, self.assets)
        return self.env

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None


class Demonstrator(Recorder):
    """Take k starts from init state k, round and round; each has random habits of its own, decided by the seed."""

    def __init__(self, suite: str, assets: AssetSet, *, seed: int) -> None:
        super().__init__(suite, assets)
        self.seed = seed

    def make(self, env: LiberoEnv, task: int, take: int) -> Episode | None:
        init_state = take % num_init_states(self.suite, task)
        actions = demonstrate(env, init_state, np.random.default_rng([self.seed, task, take]))
        if actions is None:
            return None
        env.reset(init_state)
        settle(env)
        source = f"{env.task_name}, expert, init state {init_state}, seed {self.seed}, take {take}"
        return replay(env, drop_noops(np.array(actions)), source=source)


class Replayer(Recorder):
    """Take k is demo_k of the task's HDF5 file, played in the world of the task's k-th episode."""

    def __init__(self, suite: str, assets: AssetSet, *, files: dict[int, Path]) -> None:
        super().__init__(suite, assets)
        self.files = files

    def make(self, env: LiberoEnv, task: int, take: int) -> Episode | None:
        demo = read_demo(self.files[task], take)
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


def settle(env: LiberoEnv) -> None:
    """Objects fall before the first frame, as in evaluation."""
    for _ in range(SETTLING_STEPS):
        env.step(SETTLE)
