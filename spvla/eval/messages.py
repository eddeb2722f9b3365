"""What the driver, the environment workers and the policy servers say to one another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spvla.benchmarks.libero.assets import AssetSet
from spvla.policies.registry import PLAIN_OPENVLA, AdaptablePolicy, Description
from spvla.types import Env, Needs, Observation, Outcome, Status, Trial


def differing(one: object, other: object, names: Sequence[str]) -> list[str]:
    pairs = ((n, getattr(one, n), getattr(other, n)) for n in names)
    return [f"{n}: {a} here, {b} there" for n, a, b in pairs if a != b]


@dataclass(frozen=True, kw_only=True)
class Version:
    """One policy that the farm knows: a base checkpoint, or an adapter on one."""

    digest: str
    name: str
    path: str
    base: str  # checkpoint that is loaded; the adapter, if any, joins it
    is_adapter: bool
    description: Description = PLAIN_OPENVLA

    @property
    def needs(self) -> Needs:
        """What environments must show it, and how many of its actions they execute."""
        return self.description.needs

    @property
    def opened_as(self) -> tuple[str, str]:
        """Equal for versions that one open base serves."""
        return self.base, repr(self.description)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`load(version, settings)` opens a version's base; tests give fakes."""

    device: str  # "cpu" or "cuda"
    dtype: str
    load_in_8bit: bool
    load_in_4bit: bool
    decode_batch_size: int  # every batch is padded to this; 0: batches keep their own size
    max_batch: int
    wait_ms: float | None
    log_folder: str | None
    load: Callable[[Version, "ServerSettings"], AdaptablePolicy]


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What the protocol must know of a policy server."""

    device: str  # "cpu", or the GPU's name, and the version of the fused products that it has
    pid: int

    def differences(self, other: "ServerFacts") -> list[str]:
        return differing(self, other, ("device",))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to a policy. 150 KB an image: with two it still travels inline in Ray's message."""

    version: str  # digest
    observation: Observation
    unnorm_key: str


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    assets: Path | None
    num_steps_wait: int
    center_crop: bool
    max_steps: dict[str, int]  # suite -> limit
    call_timeout_s: float
    log_folder: str | None
    open_env: Callable[[str, int, AssetSet], Env]


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What the protocol must know of a machine that simulates."""

    assets: str
    assets_digest: str
    renderer: str
    versions: dict[str, str]  # package -> version
    pid: int
    log: str

    def differences(self, other: "WorkerFacts") -> list[str]:
        return differing(self, other, ("assets_digest", "renderer", "versions"))


@dataclass(frozen=True, kw_only=True)
class Order:
    """A trial for a worker to play."""

    trial: Trial
    needs: Needs  # of the trial's policy
    unnorm_key: str
    film: frozenset[Status]  # outcomes worth a video


# kinds of faults
POLICY_GONE, POLICY_RAISED, EXCEPTION = "policy actor gone", "policy actor raised", "exception"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """An infrastructure error under a trial."""

    kind: str
    message: str
    traceback: str
    policy_at_fault: bool  # the policy actor fell, not the environment


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of an order: an outcome or a fault."""

    outcome: Outcome | None = None
    fault: Fault | None = None
    video: bytes | None = None
    no_video: str = ""  # why one that was wanted could not be encoded
    rss_bytes: int = 0
