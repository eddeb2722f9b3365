"""Families of policies: which one a checkpoint is of, what it needs to see, and how it is opened.

A family is one folder of this room and one line in FAMILIES, which names a module with two functions
(`PolicyFamily`). They are asked in order; "openvla" comes last, since it is what a checkpoint of that model type is
when it shows no more. Nothing heavy is imported before a checkpoint is opened.
"""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from spvla.types import ONE_STEP, Needs, Policy

FAMILIES = {
    "oft": "spvla.policies.oft.family",
    "openvla": "spvla.policies.openvla.family",
}
EXTERNAL = {  # policies whose weights are not known to us
    "server": "spvla.policies.remote",
    "object": "spvla.policies.foreign",
}


@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    """What a command's flags say about a checkpoint, named as OpenVLA-OFT's users know them; None: nothing."""

    use_l1_regression: bool | None = None
    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    num_open_loop_steps: int | None = None  # of a chunk, executed before the policy is asked again


NO_FLAGS = PolicyFlags()


def flags_of(config: object) -> PolicyFlags:
    """Those that a command has."""
    return PolicyFlags(**{f.name: getattr(config, f.name, None) for f in fields(PolicyFlags)})


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint is, as its folder and the flags tell before anything is loaded. It travels to other machines,
    which may not see an adapter's folder."""

    family: str
    needs: Needs
    form: Any = None  # the family's own: what `open` must know beside the base's weights
    has_statistics: bool = True  # actions are un-normalised with statistics of its folder, found by a key


PLAIN_OPENVLA = Description(family="openvla", needs=ONE_STEP)


class AdaptablePolicy(Policy, Protocol):
    """A `Policy` of one base that takes adapters in and lets them go, each under a name."""

    default_adapter: str | None  # what acts where a call names none

    def prepare(self, instructions: list[str]) -> None:
        """Makes ready for these, so that no request waits for a compiler."""

    def add_adapter(self, name: str, folder: Path) -> None: ...

    def remove_adapter(self, name: str) -> None: ...


class PolicyFamily(Protocol):
    """What a family's module offers."""

    def describe(self, base: Path, adapter: Path | None, flags: PolicyFlags) -> Description | None:
        """None where the checkpoint is of another family. Raises UserError where it is of this one and broken, or the
        flags say otherwise than its files."""

    def open(
        self,
        base: Path,
        description: Description,
        *,
        name: str,
        device: str,
        dtype: str,
        load_in_8bit: bool,
        load_in_4bit: bool,
        decode_batch_size: int,
    ) -> AdaptablePolicy:
        """A base without adapters, as `description` has it: an adapter of that form can join. Raises UserError."""


@dataclass(frozen=True, kw_only=True)
class ExternalPolicy:
    """A policy without a folder: who it is, and what it needs."""

    digest: str
    name: str
    description: Description


class ExternalKind(Protocol):
    """What a module of EXTERNAL offers."""

    def describe(self, source: str, flags: PolicyFlags) -> ExternalPolicy:
        """Finds out what the policy is, before actors start. Raises UserError."""

    def open(self, description: Description, *, number: int) -> AdaptablePolicy:
        """number: of the policy actor that opens it, from 0. Raises UserError."""


def describe(path: str | Path, flags: PolicyFlags = NO_FLAGS) -> Description:
    """What the checkpoint or adapter at `path` is. Reads small files only. Raises UserError."""
    from spvla.policies.checkpoint import base_of, norm_stats

    base, adapter = base_of(path)
    found = (family(name).describe(base, adapter, flags) for name in FAMILIES)
    description = next(description for description in found if description is not None)
    if description.has_statistics:
        for folder in filter(None, (base, adapter)):
            norm_stats(folder)  # refuses what no policy can act by
    return description


def family(name: str) -> PolicyFamily:
    return importlib.import_module(FAMILIES[name])


def external(kind: str) -> ExternalKind:
    return importlib.import_module(EXTERNAL[kind])


def load_policy(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    decode_batch_size: int = 0,
    flags: PolicyFlags = NO_FLAGS,
) -> AdaptablePolicy:
    """Opens a checkpoint folder, an adapter folder (with its base), a cached Hugging Face name, or a preset.

    decode_batch_size: pad every batch to this many rows, so that no result depends on who shares its batch (and, on a
    GPU, so that it runs as one CUDA graph); 0 decodes each batch at its own size. flags: what the folder cannot say.
    Raises CheckpointError, UserError.
    """
    from spvla.policies.checkpoint import base_of

    base, adapter = base_of(path)
    description = describe(path, flags)
    policy = family(description.family).open(
        base,
        description,
        name=str(path),
        device=device,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        decode_batch_size=decode_batch_size,
    )
    if adapter is not None:
        policy.add_adapter(str(adapter), adapter)
        policy.default_adapter = str(adapter)
    return policy
