"""What travels between rooms, and the seams (`Policy`, `Benchmark`, `Env`), each with an honest fake in tests/fakes.py.

Legend, used in shape comments everywhere: B batch, T tokens or time steps, V vocabulary, A action dims (7), K actions
in a chunk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np

ACTION_DIM = 7
PROPRIO_DIM = 8  # end-effector position, axis-angle, two gripper joints
IMAGE_SIZE = 224  # what the policy sees
CAMERA_SIZE = 256  # what the simulator renders and the data sets hold
ENV_NUMBER = "SPVLA_ENV_NUMBER"  # environment variable of one of many that draw: its number among them, from 0


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of T steps: raw LIBERO actions, frames as JPEG (q95, 4:2:0) rotated by 180 degrees.

    A data set may lack what plain OpenVLA does not look at: wrist images, states and joint states are then empty.
    """

    images: Sequence[bytes]  # T JPEGs of (256, 256, 3), agentview
    wrist_images: Sequence[bytes]  # T JPEGs of (256, 256, 3), or none
    states: np.ndarray  # (T, 8) float32: end-effector position, axis-angle, two gripper joints; or (0, 8)
    joint_states: np.ndarray  # (T, 7) float32, or (0, 7)
    actions: np.ndarray  # (T, 7) float32, gripper -1 open, +1 closed
    instruction: str
    source: str  # where it came from; `episode_metadata/file_path` in RLDS


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One recorded step, after the LIBERO transform (gripper 1 open, 0 closed), before normalisation."""

    image: bytes  # JPEG of (256, 256, 3), agentview
    wrist_image: bytes | None  # JPEG of (256, 256, 3); None where the data set has none
    proprio: np.ndarray | None  # (8,) float32, as in `Episode.states`
    action: np.ndarray  # (7,) float32
    instruction: str
    episode: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B training samples as the loader hands them out: C cameras, K actions from the current step on.

    Ids are right-padded with the tokenizer's PAD; what a policy learns to say are the last 7 K + 1 of each `lengths`.
    """

    images: np.ndarray  # (B, C, 224, 224, 3) uint8; `augmentation` still to be applied, if there is one
    input_ids: np.ndarray  # (B, T) int64: BOS, prompt, 29871, 7 K action tokens, EOS
    lengths: np.ndarray  # (B,) int64: how many of them are no padding
    actions: np.ndarray  # (B, K, 7) float32, normalised to [-1, 1]
    samples: np.ndarray  # (B,) int64: number of each current frame over all stores, stable over epochs
    proprio: np.ndarray | None = None  # (B, 8) float32, normalised; where the policy needs it
    augmentation: np.ndarray | None = None  # (B, C, 6) float32: what was drawn, for `augment_on_device`


@dataclass(frozen=True, kw_only=True, order=True)
class Trial:
    """One rollout to be made. With the protocol's digest this is the ledger's key."""

    policy: str  # digest of the policy's weights
    suite: str
    task: int
    init_state: int


class Status(StrEnum):
    SUCCESS = "success"
    FAILURE = "failure"  # the policy's own; a crash is never one


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended."""

    status: Status
    steps: int  # policy steps taken, settling steps not counted
    seconds: float
    state_digest: str  # sha256 of the final qpos and qvel: equal wherever the trial runs
    note: str = ""  # why, where the policy was at fault: "NaN action at step 12"


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy sees at one step; holds what its `Needs` name, and nothing else."""

    images: tuple[np.ndarray, ...]  # one for each camera that is needed, in that order: (224, 224, 3) uint8, upright
    instruction: str
    proprio: np.ndarray | None = None  # (8,) float32, as measured: position, axis-angle, two fingers


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a policy wants to see, and how it acts. A policy of one image and one step is the default."""

    cameras: tuple[str, ...] = ("agentview",)  # and "robot0_eye_in_hand", the wrist's
    proprio: bool = False
    chunk: int = 1  # K actions that one call answers with
    execute: int = 1  # of these, the first so many are executed before the policy is asked again
    preprocessing: Literal["openvla", "resized"] = "openvla"  # a frame's way to an image; see `policies.observations`

    def __post_init__(self) -> None:
        assert self.cameras and 1 <= self.execute <= self.chunk, self


ONE_STEP = Needs()


class Policy(Protocol):
    """What turns observations into actions; `spvla.load_policy` returns one."""

    @property
    def needs(self) -> Needs:
        """What each observation must hold, and how many actions answer it."""

    def act(
        self,
        observations: Sequence[Observation],  # B
        *,
        unnorm_key: str | Sequence[str],
        adapters: Sequence[str | None] | None = None,  # B names of resident adapters; None: the base
    ) -> np.ndarray:
        """(B, K, 7) float64: the next K actions for each observation, un-normalised, gripper 1 open."""


class Benchmark(Protocol):
    """Suites of tasks, and the worlds to play them in; `spvla.benchmarks.registry` finds one by a suite's name.

    It is made from flags, travels to other processes, and opens nothing before it is asked. A task is a suite's name
    and a number from 0; of each task there are numbered init states, the beginnings of its trials.
    """

    suites: Sequence[str]

    def instructions(self, suite: str) -> Sequence[str]:
        """Of each task, in the order of their numbers."""

    def max_steps(self, suite: str) -> int:
        """Steps that a trial may take, after the settling steps."""

    def trained_on(self, suite: str) -> str:
        """The suite whose action statistics a policy uses here: itself, or the one that it is a variant of."""

    def num_init_states(self, suite: str, task: int) -> int: ...

    def require(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Raises UserError unless this machine has what these tasks are made of."""

    def require_drawing(self) -> None:
        """Raises UserError unless this very machine can draw its worlds. A driver may run where no environment does."""

    def facts(self) -> dict[str, str]:
        """All that decides a trial beside the policy, as far as files tell it: versions, assets, tasks, by name.
        They are the manifest's, and must be equal on every machine."""

    @staticmethod
    def describe(facts: Mapping[str, str]) -> str:
        """What a table of results under these facts is of, and what it compares with, in a sentence."""

    def measure(self) -> dict[str, str]:
        """More of that, where it takes a machine that simulates: what draws, say."""

    def open_env(self, suite: str, task: int, *, spare_gpu: bool = False) -> "Env":
        """spare_gpu: a policy decodes on the GPU that would draw, so the less is drawn the better."""


class Env(Protocol):
    """One task, held open over many trials. Rendering is asked for, never a side effect of stepping."""

    instruction: str

    def reset(self, init_state: int) -> None:
        """Puts the world in the state of the task's `init_state`-th episode, whatever ran before."""

    def step(self, action: np.ndarray) -> bool:
        """One 20 Hz control step with a raw action (7,), gripper -1 open, +1 closed. True on success."""

    def image(self, camera: str = "agentview") -> np.ndarray:
        """(256, 256, 3) uint8 as LIBERO's cameras give it: not yet rotated."""

    def moment(self) -> object:
        """What `image` shows now, kept so that it can be drawn later: then only films that are wanted cost pictures."""

    def image_at(self, moment: object, camera: str = "agentview") -> np.ndarray:
        """The picture of a moment that was kept since this task's environment was opened, as `image` gave it then."""

    def proprio(self) -> tuple[np.ndarray, np.ndarray]:
        """(8,) end-effector and gripper state, (7,) joint positions; float32."""

    def state_digest(self) -> str: ...

    def close(self) -> None: ...
