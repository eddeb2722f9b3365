"""Pictures with what spares work, against pictures without it."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from spvla.benchmarks.libero.env import LiberoEnv
from spvla.render.rendering import Renderer


def fewest_shapes(
    env: LiberoEnv,
    camera: str,
    actions: np.ndarray,
    without: Callable[[Renderer], AbstractContextManager],
    *,
    every: int = 1,
) -> float:
    """Of a scene's shapes, the least share that a picture held along `actions`, one picture after `every` so many.

    Each must be the very one that the same renderer draws within `without`.
    """
    env.reset(0)
    fewest = 1.0
    for step, action in enumerate(actions, start=1):
        env.step(action)
        if step % every == 0:
            picture, held = env.image(camera), env.renderer.scene.ngeom
            with without(env.renderer):
                assert np.array_equal(env.image(camera), picture), f"step {step}"
            fewest = min(fewest, held / env.renderer.scene.ngeom)
    return fewest
