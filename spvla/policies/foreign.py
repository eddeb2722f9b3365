"""`--policy package.module:function`: any Python object of the `Policy` protocol, made by a call without arguments.

It is identified by that name and by the module's source; its weights are not known to us.
"""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spvla.errors import UserError
from spvla.policies.registry import NO_FLAGS, Description, ExternalPolicy, PolicyFlags
from spvla.types import Needs, Observation, Policy


def describe(spec: str, flags: PolicyFlags) -> ExternalPolicy:
    """Imports the module and finds what the policy needs: the maker's own `needs`, or else those of what it makes.

    Raises UserError where there is no such function, or what it makes is no policy.
    """
    maker = find(spec, Path.cwd())
    needs = getattr(maker, "needs", None)
    if not isinstance(needs, Needs):
        needs = make(maker, spec).needs
    if flags != NO_FLAGS:
        raise UserError(
            "--num_open_loop_steps and the like with --policy",
            expected="none of them: the object's `needs` say it all",
            remedy="Change its `needs`.",
        )
    source = Path(inspect.getsourcefile(sys.modules[maker.__module__]) or "")
    identity = spec.encode() + (source.read_bytes() if source.is_file() else b"")
    return ExternalPolicy(
        digest=hashlib.sha256(identity).hexdigest(),
        name=spec,
        description=Description(family="object", needs=needs, form=(spec, str(Path.cwd())), has_statistics=False),
    )


def open(description: Description, *, number: int) -> "ForeignPolicy":
    spec, folder = description.form
    return ForeignPolicy(make(find(spec, Path(folder)), spec), spec)


def find(spec: str, folder: Path) -> Any:
    """The function or class that `package.module:function` names, looked for in `folder`, too."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module, _, name = spec.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(
            f"--policy {spec} ({e})",
            expected=f"package.module:function, importable from {os.fspath(folder)}",
            remedy="Correct it, or start the command where the module lies.",
        ) from e
    return found


def make(maker: Any, spec: str) -> Policy:
    policy = maker()
    if not isinstance(getattr(policy, "needs", None), Needs) or not callable(getattr(policy, "act", None)):
        raise UserError(
            f"--policy {spec} made a {type(policy).__name__}",
            expected="an object with `needs` (spvla.types.Needs) and `act(observations, *, unnorm_key, adapters)`",
            remedy="See `Policy` in spvla/types.py.",
        )
    return policy


class ForeignPolicy:
    """An object of the `Policy` protocol, with what the farm asks of those that take adapters."""

    default_adapter: str | None = None

    def __init__(self, policy: Policy, name: str) -> None:
        self.policy, self.name, self.needs = policy, name, policy.needs

    def act(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """(B, K, 7), as the object answers."""
        return self.policy.act(observations, unnorm_key=unnorm_key, adapters=adapters)

    def prepare(self, instructions: list[str]) -> None:
        prepare = getattr(self.policy, "prepare", None)
        if prepare is not None:
            prepare(instructions)

    def add_adapter(self, name: str, folder: Path) -> None:
        raise UserError(f"an adapter for {self.name}", expected="a checkpoint", remedy="Objects take no adapters.")

    def remove_adapter(self, name: str) -> None:
        """There is none."""
