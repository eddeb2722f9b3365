"""What the driver, the environment workers and the policy servers say to one another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spvla.policies.registry import PLAIN_OPENVLA, AdaptablePolicy, Description
from spvla.types import Benchmark, Needs, Observation, Outcome, Status, Trial


def differing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    pairs = ((name, here.get(name), there.get(name)) for name in sorted({*here, *there}))
    return [f"{name}: {a} here, {b} there" for name, a, b in pairs if a != b]


@dataclass(frozen=True, kw_only=True)
class PolicyVersion:
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


ELSEWHERE = "policy server"  # the device of a policy that is asked over the network


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """`load(version, settings)` opens a version's base; tests give fakes."""

    device: str  # "cpu", "cuda", or ELSEWHERE
    dtype: str
    load_in_8bit: bool
    load_in_4bit: bool
    decode_batch_size: int  # every batch is padded to this; 0: batches keep their own size
    instructions: tuple[str, ...]  # of all tasks of the benchmark: what a decoder's shape is made for
    max_batch: int
    under_way: int  # batches at once: on a GPU the second is made ready behind the first
    wait_ms: float | None
    log_folder: str | None
    number: int = 0  # of this server among the farm's
    load: Callable[[PolicyVersion, "ServerSettings"], AdaptablePolicy]


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What the protocol must know of a policy server."""

    device: str  # "cpu", or the GPU's name, and the version of the fused products that it has
    pid: int

    def differences(self, other: "ServerFacts") -> list[str]:
        return differing({"device": self.device}, {"device": other.device})


@dataclass(frozen=True, kw_only=True)
class ActionRequest:
    """One question to a policy. 150 KB an image: with two it still travels inline in Ray's message."""

    version: str  # digest
    observation: Observation
    unnorm_key: str


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    benchmark: Benchmark
    spare_gpu: bool  # see `Benchmark.open_env`
    num_steps_wait: int
    center_crop: bool
    call_timeout_s: float
    log_folder: str | None


@dataclass(frozen=True, kw_only=True)
class WorkerFacts:
    """What the protocol must know of a machine that simulates."""

    world: dict[str, str]  # the benchmark's facts, and what it measured
    pid: int
    log: str

    def differences(self, other: "WorkerFacts") -> list[str]:
        return differing(self.world, other.world)


@dataclass(frozen=True, kw_only=True)
class TrialOrder:
    """A trial for a worker to play."""

    trial: Trial
    needs: Needs  # of the trial's policy
    unnorm_key: str
    max_steps: int
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
class TrialReport:
    """What came of an order: an outcome or a fault."""

    outcome: Outcome | None = None
    fault: Fault | None = None
    video: bytes | None = None
    no_video: str = ""  # why one that was wanted could not be encoded
    rss_bytes: int = 0
