"""Policies behind a websocket: whatever speaks openpi's protocol, π0 and OFT servers and `spvla serve` among them.

A connection begins with what the server says of itself. Then each observation gets one answer:

    observation/image, observation/wrist_image  (224, 224, 3) uint8, upright
    observation/state                           (8,) float32
    prompt                                      the instruction
    -> actions (K, 7): LIBERO's own, gripper -1 open, +1 closed; or a text, which is an error

Most servers say nothing about K, so the first is asked once, before actors start. Their weights are not known to us: a
policy is identified by its addresses and by what its servers say, and one that says another thing later is refused.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, LifoQueue
from typing import Any

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidMessage, InvalidURI, WebSocketException
from websockets.sync.client import ClientConnection, connect

from spvla.errors import InfrastructureError, UserError
from spvla.policies import wire
from spvla.policies.registry import Description, ExternalPolicy, PolicyFlags
from spvla.types import ACTION_DIM, IMAGE_SIZE, PROPRIO_DIM, Needs, Observation

CAMERAS = ("agentview", "robot0_eye_in_hand")
IMAGE_KEYS = dict(zip(CAMERAS, ("observation/image", "observation/wrist_image"), strict=True))
STATE_KEY, PROMPT_KEY, PREPARED_KEY, ACTIONS_KEY = "observation/state", "prompt", "observation/prepared", "actions"
OWN = "spvla"  # entry of the metadata in which `spvla serve` says what its policy needs
EXECUTE = 5  # of a chunk, at most: openpi's own LIBERO client asks again after so many
THERE_S, BACK_S = 10.0, 600.0  # how long a server may take to be there: at first, and again after it went away
FIRST_ANSWER_S = 600.0  # the first one may compile
ANSWER_S = 300.0


@dataclass(frozen=True, kw_only=True)
class ServerForm:
    """What `open` must know."""

    urls: tuple[str, ...]
    metadata: str  # what all of them say of themselves, as JSON with sorted keys


def describe(source: str, flags: PolicyFlags, *, there_s: float = THERE_S) -> ExternalPolicy:
    """Asks each server of a comma list what it is. Raises UserError where one is not there, or not as the others."""
    urls, said = source.split(","), {}
    for url in urls:
        with Connection(url, wait_s=there_s) as connection:
            said[url] = connection.metadata
    metadata = said[urls[0]]
    for url, other in said.items():
        if other != metadata:
            raise UserError(
                f"{url} says {other} of itself, {urls[0]} says {metadata}",
                expected="servers of one policy",
                remedy="Evaluate each policy by itself.",
            )
    needs = needs_of(urls[0], json.loads(metadata), flags, there_s=there_s)
    own = json.loads(metadata).get(OWN, {})
    identity = {"urls": sorted(urls), "metadata": metadata}
    return ExternalPolicy(
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        name=str(own.get("name") or urls[0].partition("://")[2]),
        description=Description(
            family="server", needs=needs, form=ServerForm(urls=tuple(urls), metadata=metadata), has_statistics=False
        ),
    )


def needs_of(url: str, metadata: dict[str, Any], flags: PolicyFlags, *, there_s: float) -> Needs:
    """From the metadata, if the server is ours; else both cameras and the state, and as many actions as it answers."""
    if own := metadata.get(OWN):
        needs = Needs(**{**own["needs"], "cameras": tuple(own["needs"]["cameras"])})
        chunk, execute = needs.chunk, needs.execute
    else:
        needs = Needs(
            cameras=CAMERAS[: flags.num_images_in_input or len(CAMERAS)],
            proprio=flags.use_proprio is not False,
            preprocessing="resized",
        )
        chunk = len(probe(url, needs, there_s=there_s))
        execute = min(EXECUTE, chunk)
    execute = flags.num_open_loop_steps or execute
    if execute > chunk:
        raise UserError(
            f"--num_open_loop_steps {execute} for {url}",
            expected=f"1 to {chunk}, the actions of its chunk",
            remedy="Correct it; the chunk's first actions are executed.",
        )
    return replace(needs, chunk=chunk, execute=execute)


def probe(url: str, needs: Needs, *, there_s: float) -> np.ndarray:
    """(K, 7): what a server answers to nothing in particular. Raises UserError where that is no chunk of actions."""
    dark = Observation(
        images=(np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),) * len(needs.cameras),
        instruction="stand still",
        proprio=np.zeros(PROPRIO_DIM, np.float32) if needs.proprio else None,
    )
    try:
        with Connection(url, wait_s=there_s) as connection:
            return connection.ask(needs, dark, timeout_s=FIRST_ANSWER_S)
    except InfrastructureError as e:
        raise UserError(
            f"a first observation of zeros: {e}",
            expected="a chunk of actions",
            remedy="Start the server that LIBERO's observations are for (openpi's LIBERO keys).",
        ) from e


def open(description: Description, *, number: int) -> "RemotePolicy":
    """The policy of one server, by its number. Waits for one that is away; raises UserError where it is another."""
    form: ServerForm = description.form
    return RemotePolicy(form.urls[number % len(form.urls)], form.metadata, description.needs)


class RemotePolicy:
    """A `Policy`: each thread that asks has a connection of its own, for as long as it asks."""

    default_adapter: str | None = None

    def __init__(self, url: str, metadata: str, needs: Needs, *, wait_s: float = BACK_S) -> None:
        self.url, self.metadata, self.needs = url, metadata, needs
        self.idle: LifoQueue[Connection] = LifoQueue()
        self.idle.put(self._connect(wait_s))

    def act(
        self,
        observations: Sequence[Observation],
        *,
        unnorm_key: str | Sequence[str] = "",
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """(B, K, 7). The server un-normalises by itself. Raises InfrastructureError where it cannot answer."""
        return np.stack([self._ask(observation) for observation in observations])

    def prepare(self, instructions: list[str]) -> None:
        """It is."""

    def add_adapter(self, name: str, folder: Path) -> None:
        raise UserError(f"an adapter for {self.url}", expected="a checkpoint", remedy="Servers take no adapters.")

    def remove_adapter(self, name: str) -> None:
        """There is none."""

    def close(self) -> None:
        with suppress(Empty):
            while True:
                self.idle.get_nowait().close()

    def _ask(self, observation: Observation) -> np.ndarray:
        try:
            connection = self.idle.get_nowait()
        except Empty:
            connection = self._connect(THERE_S)
        try:
            actions = connection.ask(self.needs, observation, timeout_s=ANSWER_S)
        except BaseException:
            connection.close()  # its next message would be the answer to this question
            raise
        self.idle.put(connection)
        if len(actions) != self.needs.chunk:
            found = f"{self.url} answers with {len(actions)} actions"
            raise InfrastructureError(f"{found}, at first with {self.needs.chunk}")
        return actions

    def _connect(self, wait_s: float) -> "Connection":
        connection = Connection(self.url, wait_s=wait_s)
        if connection.metadata != self.metadata:
            connection.close()
            raise UserError(
                f"{self.url} says {connection.metadata} of itself, and said {self.metadata} before",
                expected="one policy from the first trial to the last",
                remedy="Start the former server again, or give another --local_log_dir.",
            )
        return connection


class Connection:
    """One websocket, after its first message."""

    def __init__(self, url: str, *, wait_s: float) -> None:
        """Tries for `wait_s`. Raises UserError where nobody is there, or somebody who speaks otherwise."""
        self.url = url
        self.socket = _dial(url, wait_s)
        try:
            first = _received(self.socket, url, timeout_s=THERE_S)
            if not isinstance(first, dict):
                raise _another_protocol(url, f"begins with {type(first).__name__}")
            self.metadata = json.dumps(_plain(first), sort_keys=True)
        except InfrastructureError as e:
            self.close()
            raise _another_protocol(url, str(e)) from e
        except BaseException:
            self.close()
            raise

    def ask(self, needs: Needs, observation: Observation, *, timeout_s: float) -> np.ndarray:
        """(K, 7) float64, gripper 1 open, 0 closed. Raises InfrastructureError where that is not what comes."""
        try:
            self.socket.send(wire.pack(message_of(needs, observation)))
        except WebSocketException as e:
            raise InfrastructureError(f"{self.url} went away ({e})") from e
        answer = _received(self.socket, self.url, timeout_s=timeout_s)
        return actions_in(answer, self.url)

    def close(self) -> None:
        with suppress(WebSocketException, OSError):
            self.socket.close()

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def message_of(needs: Needs, observation: Observation) -> dict[str, Any]:
    message: dict[str, Any] = {PROMPT_KEY: observation.instruction}
    for camera, image in zip(needs.cameras, observation.images, strict=True):
        message[IMAGE_KEYS[camera]] = image
    if observation.proprio is not None:
        message[STATE_KEY] = observation.proprio
    if needs.preprocessing != "resized":
        message[PREPARED_KEY] = True  # ours: the image is as the policy sees it
    return message


def actions_in(answer: Any, url: str) -> np.ndarray:
    """(K, 7) float64, LIBERO's gripper (-1 open) turned into the policy's (1 open). Raises InfrastructureError."""
    actions = answer.get(ACTIONS_KEY) if isinstance(answer, dict) else None
    shape = np.shape(actions)
    if actions is None or len(shape) != 2 or shape[1] != ACTION_DIM or not shape[0]:
        found = f"actions of shape {shape}" if actions is not None else "no actions"
        raise InfrastructureError(f"{url} answers with {found}; expected (K, {ACTION_DIM})")
    actions = np.array(actions, np.float64)
    actions[:, -1] = (1 - actions[:, -1]) / 2
    return actions


def _dial(url: str, wait_s: float) -> ClientConnection:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return connect(url, compression=None, max_size=wire.MAX_BYTES, open_timeout=max(1.0, min(wait_s, 20.0)))
        except (InvalidURI, InvalidMessage, InvalidHandshake) as e:
            raise _another_protocol(url, str(e)) from e
        except (OSError, TimeoutError, EOFError) as e:
            if time.monotonic() > deadline:
                raise UserError(
                    f"no policy server at {url} ({e or type(e).__name__})",
                    expected="one that listens, within ten seconds",
                    remedy="Start it, or correct --policy_server ws://HOST:PORT.",
                ) from e
        time.sleep(0.5)


def _received(socket: ClientConnection, url: str, *, timeout_s: float) -> Any:
    """The next message. A text is an error of the server's, as openpi has it."""
    try:
        data = socket.recv(timeout=timeout_s)
    except TimeoutError:
        raise InfrastructureError(f"{url} has not answered within {timeout_s:.0f} s") from None
    except WebSocketException as e:
        raise InfrastructureError(f"{url} went away ({e})") from e
    if isinstance(data, str):
        lines = data.strip().splitlines()
        raise InfrastructureError(f"{url} answers with an error: {lines[-1] if lines else 'an empty text'}")
    try:
        return wire.unpack(data)
    except UserError as e:
        raise InfrastructureError(f"{url} sends {e.got}") from e


def _another_protocol(url: str, why: str) -> UserError:
    return UserError(
        f"{url} does not speak the protocol ({why})",
        expected="openpi's: a websocket whose first message is a msgpack map",
        remedy="Correct --policy_server, or start such a server.",
    )


def _plain(value: Any) -> Any:
    """Metadata as JSON holds it."""
    if isinstance(value, dict):
        return {str(k.decode() if isinstance(k, bytes) else k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
