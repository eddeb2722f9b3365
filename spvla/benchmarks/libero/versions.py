"""Which MuJoCo simulates, and so which world a success rate is of.

Demonstrations and published checkpoints come from MuJoCo before 3.3.3, from which on libero_object's floor is drawn
darker, and before 3.4.0, from which on boxes touch in other points and a bowl of libero_spatial comes to rest elsewhere
(docs/protocol.md shows both). Installing is pinned to that range; whoever simulates with another says so.
"""

import importlib.metadata
import re

from spvla.errors import UserError

OLDEST, NEWEST = "3.2.7", "3.3.2"
INSTALL = f"pip install mujoco=={NEWEST}"


def installed_mujoco() -> str:
    """The version on Python's path. Raises UserError where there is none, or more than one."""
    found = {d.version: d.locate_file("") for d in importlib.metadata.distributions(name="mujoco")}
    if not found:
        raise UserError("no package mujoco", expected=f"MuJoCo {NEWEST}", remedy=f"Run `{INSTALL}`.")
    if len(found) > 1:
        raise UserError(
            "MuJoCo is on Python's path more than once: " + ", ".join(f"{v} in {at}" for v, at in found.items()),
            expected=f"one version, {NEWEST}, the same in every process",
            remedy="Uninstall the others, or take their folders out of PYTHONPATH.",
        )
    return next(iter(found))


def require_mujoco(*, any_version: bool) -> str:
    """The installed version. Raises UserError for one that published checkpoints do not know, unless any will do."""
    found = installed_mujoco()
    if not any_version:
        require_known_mujoco(found)
    return found


def is_known(mujoco: str) -> bool:
    """Whether the world under this version is the one that published checkpoints know."""
    return _numbers(OLDEST) <= _numbers(mujoco) <= _numbers(NEWEST)


def require_known_mujoco(mujoco: str) -> None:
    """Raises UserError for a version under which a task may be another one."""
    if not is_known(mujoco):
        raise UserError(
            f"MuJoCo {mujoco}, under which objects rest elsewhere or floors look otherwise",
            expected=f"{OLDEST} to {NEWEST}, which demonstrations and published checkpoints come from",
            remedy=f"Run `{INSTALL}`, or give --any_mujoco True: such rates compare with each other only.",
        )


def world(mujoco: str, assets: str) -> str:
    """What a table is of, in a sentence; `assets` is an asset set's name."""
    objects = {
        "libero": "LIBERO's own objects",
        "primitives": "the embedded primitive geometry, not LIBERO's own objects,",
    }.get(assets, f"the assets {assets}, whose files differ from LIBERO's own,")
    if assets == "libero" and is_known(mujoco):
        return f"{objects} under MuJoCo {mujoco}: the world of LIBERO's demonstrations and published checkpoints."
    return f"{objects} under MuJoCo {mujoco}: these rates compare with each other, not with published ones."


def _numbers(version: str) -> tuple[int, ...]:
    """ "3.3.2" and "3.3.2.dev1" -> (3, 3, 2)."""
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
