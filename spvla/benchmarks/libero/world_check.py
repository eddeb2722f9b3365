"""Whether the forty tasks lie and look on this machine as in stock LIBERO, and if not, why: `spvla doctor --world`."""

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from spvla.benchmarks.libero import versions
from spvla.benchmarks.libero.assets import AssetSet
from spvla.benchmarks.libero.world import INIT_STATES, WAIT, WAIT_STEPS, Difference, Place, Snapshot, difference, load
from spvla.cluster.machines import usable_cpus
from spvla.errors import InfrastructureError, SpvlaError
from spvla.render.context import draw_on_one_core

MAX_PROCESSES = 16  # of a GB each


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What most likely makes a task differ."""

    what: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides a world here."""

    mujoco: str
    assets: str  # the set's name
    renderer: str

    def cause(self, found: Difference) -> Cause:
        """The first of these that is not as it was for the reference, and can do what was found."""
        if not versions.is_known(self.mujoco):
            return Cause(what=f"MuJoCo {self.mujoco}", remedy=f"run `{versions.INSTALL}`")
        if self.assets != "libero":
            return Cause(
                what=f"the {self.assets} assets",
                remedy="install LIBERO's own with `make setup`, or name their folder in LIBERO_ASSETS",
            )
        if found.moved:
            return Cause(
                what="packages that compute otherwise (robosuite, numpy, numba)",
                remedy="install the versions of requirements.lock: `make setup`",
            )
        return Cause(
            what=f"the renderer, {self.renderer}",
            remedy="draw with Mesa's llvmpipe as the reference was, or compare rates with others of this renderer only",
        )


def settle(place: Place, assets: AssetSet) -> list[Snapshot]:
    """A task, once for each of INIT_STATES. Raises SpvlaError where it cannot be built, played or drawn."""
    from spvla.benchmarks.libero import stock
    from spvla.benchmarks.libero.env import LiberoEnv

    draw_on_one_core()
    stock.cache_files(stock.MUJOCO_CACHE)  # a process builds one task after another, and they have much in common
    snapshots = []
    with LiberoEnv(*place, assets) as env:
        for init_state in INIT_STATES:
            env.reset(init_state)
            for _ in range(WAIT_STEPS):
                env.step(WAIT)
            snapshots.append(Snapshot.of(env.model, env.data, env.image()))
    return snapshots


def check(assets: AssetSet) -> Iterator[tuple[Place, Difference]]:
    """Every task of the reference as it is done, by several processes; in no order.

    Raises InfrastructureError for the first task that cannot be played here.
    """
    reference = load()
    processes = min(usable_cpus(), MAX_PROCESSES)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _leave_interrupts_to_the_parent) as pool:
        running = {pool.submit(settle, place, assets): place for place in reference}
        try:
            for done in as_completed(running):
                place = running[done]
                yield place, difference(_result(place, done), reference[place])
        finally:
            pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _result(place: Place, done: Future[list[Snapshot]]) -> list[Snapshot]:
    name = f"{place[0]} task {place[1]}"
    try:
        return done.result()
    except BrokenProcessPool as e:
        raise InfrastructureError(f"a process died while it played {name} or one beside it; see its lines above") from e
    except SpvlaError:
        raise
    except Exception as e:  # LIBERO, robosuite or MuJoCo, each in its own way
        raise InfrastructureError(f"{name} cannot be played here: {type(e).__name__}: {e}") from e
