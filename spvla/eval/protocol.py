"""The manifest of an evaluation: everything a success rate depends on but the policy, and its digest.

Two results may stand in one table only if their manifests are equal, so the digest is part of every trial's key.
docs/protocol.md says what each field does to a result.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from spvla.errors import LedgerError

# Raise when the order of a trial's operations changes what an outcome would be: reset, settling, image path, gripper.
VERSION = 1
UNKNOWN = "unknown"  # dtype of a policy whose weights are not known to us
YOUNGER = ("num_images_in_input", "num_open_loop_steps")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`world` and `device` are what the machines that run the trials say of themselves."""

    world: Mapping[str, str]  # the benchmark's: assets, tasks, versions, renderer. The manifest has them as its own
    num_steps_wait: int
    max_steps: int | None = None  # None: each suite's own limit
    center_crop: bool
    unnorm_key: str | None = None  # None: the suite's name, or that + "_no_noops"
    seed: int
    device: str  # "cpu", or the GPU's name, and the version of the fused products that it has
    dtype: str
    quantization: str = "none"  # "none", "8bit", "4bit"
    decode_batch_size: int  # 0: batches of any size, so the load may show in the last bits
    num_images_in_input: int | None = None  # None, here and below: as the checkpoint has it
    num_open_loop_steps: int | None = None
    version: int = VERSION

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(self.manifest(), sort_keys=True)

    def manifest(self) -> dict[str, Any]:
        """All fields by name, the world's among them. Those younger than the first ledgers are left out where they say
        nothing, so that older digests stay what they are."""
        own = {k: v for k, v in asdict(self).items() if k not in YOUNGER or v is not None}
        return own.pop("world") | own

    @classmethod
    def from_json(cls, text: str) -> "Protocol":
        manifest = json.loads(text)
        own = {f.name: manifest.pop(f.name) for f in fields(cls) if f.name in manifest}
        return cls(world=manifest, **own)


def differences(old: Protocol, new: Protocol) -> list[str]:
    """["center_crop: True -> False"] for each field that differs."""
    before, now = old.manifest(), new.manifest()
    pairs = ((name, before.get(name), now.get(name)) for name in dict.fromkeys([*before, *now]))
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


def require_same(old: Protocol, new: Protocol, *, where: str) -> None:
    """Raises LedgerError, naming each field that differs."""
    if changed := differences(old, new):
        raise LedgerError(
            f"{where} holds results of another protocol ({'; '.join(changed)})",
            expected="the protocol it was begun with, because results of two protocols do not compare",
            remedy="Restore those settings, or give another --local_log_dir.",
        )
