"""Makes the reference that `spvla doctor --world` compares with: stock LIBERO, driven as its own evaluation drives it.

    python bench/world_reference.py [--suites libero_spatial,libero_object,libero_goal,libero_10] [--out world.npz]

Episode i of a task is the (i+1)-th reset after seed 0, its init state i; then ten waiting steps. To be made under the
MuJoCo of published checkpoints, with LIBERO's own objects, on Mesa's software EGL; refuses anything else. Takes some
15 minutes on one core; suites that are left out keep what the file has.
"""

import argparse
import sys
from pathlib import Path

from spvla.benchmarks.libero import stock  # before libero: it keeps the import silent
from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.init_states import init_states
from spvla.benchmarks.libero.suites import task_info
from spvla.benchmarks.libero.versions import NEWEST, installed_mujoco
from spvla.benchmarks.libero.world import (
    INIT_STATES,
    REFERENCE,
    SUITES,
    WAIT,
    WAIT_STEPS,
    Place,
    Snapshot,
    load,
    save,
)
from spvla.progress import Progress
from spvla.render.context import renderer_name


def settle(place: Place, assets: AssetSet) -> list[Snapshot]:
    from libero.libero.envs import OffScreenRenderEnv

    stock.use_assets(assets.path)
    env = OffScreenRenderEnv(
        bddl_file_name=str(task_info(*place).bddl_file),
        camera_names=["agentview"],
        camera_heights=256,
        camera_widths=256,
    )
    env.seed(0)
    states, snapshots = init_states(*place), []
    for episode in range(max(INIT_STATES) + 1):
        env.reset()
        if episode not in INIT_STATES:
            continue
        env.set_init_state(states[episode])
        for _ in range(WAIT_STEPS):
            observation, *_ = env.step(WAIT.tolist())
        sim = env.sim
        snapshots.append(Snapshot.of(sim.model._model, sim.data._data, observation["agentview_image"]))
    env.close()
    return snapshots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--out", type=Path, default=REFERENCE)
    args = parser.parse_args()
    assets = resolve()
    stock.cache_files(stock.MUJOCO_CACHE)
    made_with = installed_mujoco(), assets.name, renderer_name()
    if made_with[:2] != (NEWEST, "libero") or "llvmpipe" not in made_with[2]:
        sys.exit(f"made with {', '.join(made_with)}; expected MuJoCo {NEWEST}, LIBERO's own objects and llvmpipe")
    snapshots = load(args.out) if args.out.exists() else {}
    places = [(suite, task) for suite in args.suites.split(",") for task in range(10)]
    with Progress("reference", total=len(places), unit="tasks") as progress:
        for done, place in enumerate(places, 1):
            snapshots[place] = settle(place, assets)
            progress.update(done)
    save(args.out, snapshots)


if __name__ == "__main__":
    main()
