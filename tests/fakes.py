"""Honest fakes of the seams: they keep the whole contract, in a few lines of arithmetic."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spvla.types import ONE_STEP, Needs, Observation


class FakeEnv:
    """A world of one number: each step adds the action's first dimension; success above `goal`."""

    instruction = "move right"

    def __init__(self, goal: float = 1.0) -> None:
        self.goal, self.x, self.closed = goal, 0.0, False

    def reset(self, init_state: int) -> None:
        self.x = -0.01 * init_state

    def step(self, action: np.ndarray) -> bool:
        assert action.shape == (7,)
        self.x += float(action[0])
        return self.x > self.goal

    def image(self, camera: str = "agentview") -> np.ndarray:
        level = int(np.clip(128 + 100 * self.x, 0, 255))
        return np.full((256, 256, 3), level, np.uint8)

    def moment(self) -> float:
        return self.x

    def image_at(self, moment: float, camera: str = "agentview") -> np.ndarray:
        x, self.x = self.x, moment
        picture, self.x = self.image(camera), x
        return picture

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        return np.full(8, self.x, np.float32), np.zeros(7, np.float32)

    def state_digest(self) -> str:
        return hashlib.sha256(np.float64(self.x).tobytes()).hexdigest()

    def close(self) -> None:
        self.closed = True


class FakeBenchmark:
    """Tasks of the world of one number: task t is won beyond 1 + t. `open(suite, task)` may give other worlds."""

    suites = ("libero_object", "libero_goal")  # so named that a tiny checkpoint has statistics for them

    def __init__(self, open: Callable[[str, int], FakeEnv] | None = None) -> None:
        self.open = open or (lambda suite, task: FakeEnv(goal=1.0 + task))

    def instructions(self, suite: str) -> list[str]:
        return [f"move beyond {1 + task}" for task in range(10)]

    def max_steps(self, suite: str) -> int:
        return 280

    def trained_on(self, suite: str) -> str:
        return suite

    def num_init_states(self, suite: str, task: int) -> int:
        return 50

    def require(self, wanted: Sequence[tuple[str, int]]) -> None:
        assert all(suite in self.suites and task < 10 for suite, task in wanted)

    def require_drawing(self) -> None:
        """numpy is there."""

    def facts(self) -> dict[str, str]:
        return {"benchmark": "one number"}

    @staticmethod
    def describe(facts: Mapping[str, str]) -> str:
        return f"the world of {facts['benchmark']}."

    def measure(self) -> dict[str, str]:
        return {"renderer": "numpy"}

    def open_env(self, suite: str, task: int, *, spare_gpu: bool = False) -> FakeEnv:
        return self.open(suite, task)


class FakePolicy:
    """Moves right by `speed`, whatever it sees; asks for what its `needs` name, and refuses to do with less."""

    def __init__(self, speed: float = 0.1, needs: Needs = ONE_STEP) -> None:
        self.speed, self.needs = speed, needs

    def prepare(self, instructions: list[str]) -> None:
        """It needs no preparation."""

    def act(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        for observation in observations:
            assert [image.shape for image in observation.images] == [(224, 224, 3)] * len(self.needs.cameras)
            assert (observation.proprio is not None) == self.needs.proprio
        actions = np.zeros((len(observations), self.needs.chunk, 7))
        actions[..., 0] = self.speed
        return actions
