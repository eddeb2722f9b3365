"""The manifest of an evaluation: everything a success rate depends on but the policy, and its digest.

Two results may stand in one table only if their manifests are equal, so the digest is part of every trial's key.
docs/protocol.md says what each field does to a result.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from spvla.errors import LedgerError
from spvla.types import MAX_STEPS

# Raise when the order of a trial's operations changes what an outcome would be: reset, settling, image path, gripper.
VERSION = 1
YOUNGER = ("num_images_in_input", "num_open_loop_steps")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """`renderer`, `device`, `dtype` and the package versions are measured on the machines that run the trials."""

    assets: str  # name of the asset set: "libero", "primitives"
    assets_digest: str
    tasks_digest: str = ""  # of the tasks' names, goals and init states; none in ledgers from before it was kept
    renderer: str  # OpenGL renderer: pixels differ between software and each family of GPUs
    mujoco: str
    robosuite: str
    libero: str
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
        """Fields younger than the first ledgers are left out where they say nothing, so those keep their digests."""
        written = {k: v for k, v in asdict(self).items() if k not in YOUNGER or v is not None}
        return json.dumps(written, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Protocol":
        return cls(**json.loads(text))

    def steps_limit(self, suite: str) -> int:
        return MAX_STEPS[suite] if self.max_steps is None else min(self.max_steps, MAX_STEPS[suite])


def differences(old: Protocol, new: Protocol) -> list[str]:
    """["center_crop: True -> False"] for each field that differs."""
    pairs = ((f.name, getattr(old, f.name), getattr(new, f.name)) for f in fields(Protocol))
    return [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]


def require_same(old: Protocol, new: Protocol, *, where: str) -> None:
    """Raises LedgerError, naming each field that differs."""
    if changed := differences(old, new):
        raise LedgerError(
            f"{where} holds results of another protocol ({'; '.join(changed)})",
            expected="the protocol it was begun with, because results of two protocols do not compare",
            remedy="Restore those settings, or give another --local_log_dir.",
        )
