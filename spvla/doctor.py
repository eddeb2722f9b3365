"""`spvla doctor`: what this machine has, and a remedy for each gap. `spvla clean`: remove the caches."""

import ctypes.util
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spvla.config import CleanConfig, DoctorConfig
from spvla.errors import InfrastructureError, UserError
from spvla.files import cache_dir
from spvla.progress import Progress
from spvla.render.context import INSTALL_EGL, try_drawing

MIN_FREE_GIB = 20  # one merged 7B checkpoint is 15 GB
CACHED = (
    "assets",
    "presets",
    "digests",
    "libero-config",
    "numba",
    "matplotlib",
)  # what this project writes into the cache folder


@dataclass(frozen=True)
class Finding:
    """One line of the report; a finding with a remedy is a gap."""

    subject: str
    found: str
    remedy: str = ""


def doctor(config: DoctorConfig) -> None:
    """Prints one line a subject; gaps carry their remedy. Never fails: it reports. Only --world raises where this
    machine's world is not LIBERO's."""
    if config.install_egl:
        install_egl()
    if config.world:
        return compare_world()
    if config.quiet:
        findings: Iterator[Finding] = (f for f in (egl_library(),) if f.remedy)
    else:
        findings = examine()
    for f in findings:
        print(f"{'gap' if f.remedy else 'ok ':<4}{f.subject:<10}{f.found}")
        if f.remedy:
            print(f"{'':14}-> {f.remedy}")


def examine() -> Iterator[Finding]:
    yield from map(found_by, (packages, gpu, egl_library, renderer, simulator, assets, cache, ray_cluster, disk, wandb))


def found_by(look: Callable[[], Finding]) -> Finding:
    """Whatever is broken on this machine, the other lines are wanted."""
    try:
        return look()
    except UserError as e:
        return Finding(look.__name__, e.got, e.remedy)
    except Exception as e:
        return Finding(look.__name__, f"cannot be looked at ({type(e).__name__}: {e})", "mend what that names")


def packages() -> Finding:
    names = ("torch", "ray", "mujoco", "robosuite", "hf-libero", "tensorflow")
    missing, found = [], [f"python {sys.version.split()[0]}"]
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return Finding("packages", ", ".join(found), f"missing {', '.join(missing)}: run `make setup`" if missing else "")


def gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return Finding("GPU", "none", "fine for the tiny preset; a 7B policy needs one NVIDIA GPU with 24 GB or more")
    return Finding("GPU", "; ".join(lines))


def egl_library() -> Finding:
    if ctypes.util.find_library("EGL"):
        return Finding("EGL", "libEGL found")
    return Finding("EGL", "libEGL is missing: nothing can be rendered", f"as root: {INSTALL_EGL}")


def renderer() -> Finding:
    try:
        return Finding("renderer", try_drawing())
    except UserError as e:
        return Finding("renderer", e.got, e.remedy)


def simulator() -> Finding:
    from spvla.benchmarks.libero import versions

    found = versions.require_mujoco(any_version=False)
    return Finding("simulator", f"MuJoCo {found}, which published checkpoints know")


def assets() -> Finding:
    from spvla.benchmarks.libero.assets import PRIMITIVES, resolve

    found = resolve(None)
    what = f"{found.name} at {found.path}"
    if found.name == "libero":
        return Finding("assets", f"LIBERO's own: {what}")
    if found.name == PRIMITIVES:
        remedy = "geometry stand-ins, not comparable with published numbers: `make setup` installs LIBERO's own"
    else:
        remedy = "files that differ from LIBERO's own: results are of another world, and named after it"
    return Finding("assets", what, remedy)


def cache() -> Finding:
    folder = cache_dir()
    lasts = folder.parent != Path(tempfile.gettempdir()) or "SPVLA_CACHE" in os.environ
    remedy = "the user's own cannot be written: this one is lost with the temporary folder; name another in SPVLA_CACHE"
    return Finding("cache", str(folder), "" if lasts else remedy)


def compare_world() -> None:
    """One line for each of LIBERO's forty tasks that lies or looks otherwise here than in stock LIBERO, then the
    likely causes with their remedies. Raises SpvlaError where there is any, or where this machine cannot tell."""
    from spvla.benchmarks.libero.assets import resolve
    from spvla.benchmarks.libero.versions import installed_mujoco
    from spvla.benchmarks.libero.world_check import Machine, check

    assets = resolve(None)
    here = Machine(mujoco=installed_mujoco(), assets=assets.name, renderer=try_drawing())
    print(f"MuJoCo {here.mujoco}, {here.assets} assets, {here.renderer}")
    found = {}
    with Progress("world", total=40, unit="tasks") as progress:
        for place, difference in check(assets):
            found[place] = difference
            progress.update(len(found), differ=sum(d.moved or d.recoloured for d in found.values()))
    causes = {place: here.cause(d) for place, d in sorted(found.items()) if d.moved or d.recoloured}
    for (suite, task), cause in causes.items():
        print(f"gap {suite} task {task}: {found[suite, task]}; likely {cause.what}")
    for cause in dict.fromkeys(causes.values()):
        print(f"{'':4}-> {cause.what}: {cause.remedy}")
    if causes:
        raise InfrastructureError(f"{len(causes)} of {len(found)} tasks are not as in stock LIBERO")
    print(f"ok  all {len(found)} tasks lie and look as in stock LIBERO")


def ray_cluster() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return Finding("Ray", "RAY_ADDRESS is not set: each command starts a cluster of its own on this machine")
    ask = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return Finding(
            "Ray", f"no answer from RAY_ADDRESS={address}", "start it (`ray start --head`) or unset RAY_ADDRESS"
        )
    if done.returncode == 0:
        return Finding("Ray", f"a cluster answers at RAY_ADDRESS={address}")
    return Finding("Ray", f"no cluster at RAY_ADDRESS={address}", "start it (`ray start --head`) or unset RAY_ADDRESS")


def disk() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    remedy = "free some: one merged 7B checkpoint takes 15 GB" if free_gib < MIN_FREE_GIB else ""
    return Finding("disk", f"{free_gib:.0f} GiB free in {Path.cwd()}", remedy)


def wandb() -> Finding:
    if os.environ.get("WANDB_API_KEY") or Path(os.path.expanduser("~/.netrc")).exists():
        return Finding("W&B", "a key is set")
    return Finding("W&B", "no key", "only for --use_wandb True: run `wandb login`, or use --wandb_mode offline")


def install_egl() -> None:
    """Installs EGL where that is possible: root on Debian or Ubuntu. Elsewhere `doctor` names the command."""
    if egl_library().remedy == "" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing EGL: {INSTALL_EGL}")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "-qq", "update"], check=False, **quiet)
    subprocess.run(INSTALL_EGL.split(), check=False, **quiet)


def clean(config: CleanConfig) -> None:
    """Removes what this project cached for the user (generated assets, decoded frames); never runs or data."""
    from spvla.data.frames import own_folders

    places = [cache_dir() / name for name in CACHED] + list(own_folders())
    ours = [folder for folder in places if folder.is_dir()]
    size_mib = sum(f.stat().st_size for folder in ours for f in folder.rglob("*") if f.is_file()) / 2**20
    print(f"{', '.join(map(str, ours)) or cache_dir()}: {size_mib:.1f} MiB")
    if config.yes:
        for folder in ours:
            shutil.rmtree(folder)
        print("removed")
    elif ours:
        print("remove it with: spvla clean --yes True")
