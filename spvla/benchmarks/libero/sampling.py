"""When LIBERO looks at its world: the substep whose state the next observation shows.

robosuite's sensors have a clock of their own. It runs 4 ms ahead after a reset, so an observation shows the world as it
was a few milliseconds before the control step ended, and rounding lets that moment drift. A policy acts on these
pictures, so the clock is kept, sum by sum.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mujoco
import numpy as np

PERIOD_S = 1.0 / 20
SUBSTEP_S = 0.002

# All that observations depend on, besides the model.
_SEEN = (
    "qpos", "xquat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat",
    "cam_xpos", "cam_xmat", "light_xpos", "light_xdir",
)  # fmt: skip


class SensorClock:
    """Says after which substeps robosuite's sensors sample."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As after a reset and a set init state, each of which samples once."""
        self.since_s, self.sampled = SUBSTEP_S + SUBSTEP_S, True

    def tick(self) -> bool:
        """One substep. True if the sensors sample now."""
        self.since_s += SUBSTEP_S
        sample = not self.sampled and self.since_s <= PERIOD_S
        self.sampled |= sample
        if self.since_s >= PERIOD_S:
            self.since_s %= PERIOD_S
            self.sampled = False
        return sample


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """What the sensors showed at one moment, kept so that it can be drawn later."""

    world: tuple[np.ndarray, ...]  # as in _SEEN; 20 to 50 kB in all
    site_rgba: np.ndarray


class Sample:
    """The world as last sampled, in an MjData of its own so that it can be rendered whenever someone looks."""

    def __init__(self, model: mujoco.MjModel, live: mujoco.MjData) -> None:
        self.model = model
        self.data = mujoco.MjData(model)
        self._pairs = [(getattr(self.data, name), getattr(live, name)) for name in _SEEN]
        self.site_rgba = model.site_rgba.copy()

    def take(self) -> None:
        for mine, live in self._pairs:
            mine[...] = live
        self.site_rgba[...] = self.model.site_rgba  # a stove's burner glows by it

    def keep(self) -> View:
        return View(world=tuple(mine.copy() for mine, _ in self._pairs), site_rgba=self.site_rgba.copy())

    def show(self, view: View) -> None:
        """Puts back what was kept, until the next `take`."""
        for (mine, _), kept in zip(self._pairs, view.world, strict=True):
            mine[...] = kept
        self.site_rgba[...] = view.site_rgba

    @contextmanager
    def colours(self) -> Iterator[None]:
        """The model's site colours as they were, while the block renders."""
        now = self.model.site_rgba.copy()
        self.model.site_rgba[...] = self.site_rgba
        yield
        self.model.site_rgba[...] = now
