"""`spvla serve`: a checkpoint's actions for anyone's client of openpi's websocket protocol, requests batched.

What the messages hold stands in `spvla.policies.remote`, whose clients they are, too. Beside what openpi has, the first
message says in "spvla" what the policy needs, so that `spvla evaluate --policy_server` draws no more than that and
shows it the very images that it would see without a server. An image that comes as a client of openpi has made it is
used as it is, or cropped; one of another size first goes the evaluation's way.

    GET /healthz answers OK.
"""

import asyncio
import sys
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection
from websockets.asyncio.server import serve as listen
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spvla.benchmarks import registry
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.config import ServeConfig
from spvla.errors import SpvlaError, UserError
from spvla.eval.batcher import Batcher
from spvla.eval.plan import describe
from spvla.policies import wire
from spvla.policies.checkpoint import base_of, norm_stats
from spvla.policies.observations import check_observations
from spvla.policies.openvla.actions import gripper_to_env
from spvla.policies.openvla.images import crop_center, evaluation_image
from spvla.policies.registry import flags_of, load_policy
from spvla.policies.remote import ACTIONS_KEY, IMAGE_KEYS, OWN, PREPARED_KEY, PROMPT_KEY, STATE_KEY
from spvla.types import IMAGE_SIZE, Observation, Policy

ON_GPU = 8  # requests in a batch by default
INTERNAL_ERROR = 1011  # a websocket's close code


def serve(config: ServeConfig) -> None:
    """The command: answers until Ctrl-C. Raises UserError for a checkpoint or key that does not exist."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # as in evaluate: a sum's order, and so its last bit, follows the number of threads
    batch_size = config.decode_batch_size or (ON_GPU if device == "cuda" else 1)
    version = describe(config.pretrained_checkpoint, flags_of(config))
    key = the_key(config)
    policy = load_policy(
        config.pretrained_checkpoint,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        load_in_8bit=config.load_in_8bit,
        load_in_4bit=config.load_in_4bit,
        decode_batch_size=batch_size,
        flags=flags_of(config),
    )
    about = {"name": version.name, "digest": version.digest, "needs": asdict(policy.needs), "unnorm_key": key}
    policy.prepare(known_instructions())
    service = Service(policy, about, unnorm_key=key, center_crop=config.center_crop, batch_size=batch_size)
    asyncio.run(service.run(config.host, config.port))


def known_instructions() -> list[str]:
    """LIBERO's, where it is installed: made for the longest, a decoder has the shape that it has in evaluate."""
    with suppress(UserError):
        libero = registry.find("libero_spatial", BenchmarkFlags())
        return [text for suite in libero.suites for text in libero.instructions(suite)]
    return []


def the_key(config: ServeConfig) -> str:
    """The statistics to act by. Raises UserError unless they are named, or there is one set alone."""
    base, adapter = base_of(config.pretrained_checkpoint)
    stats = (adapter is not None and norm_stats(adapter)) or norm_stats(base)
    if config.unnorm_key in stats:
        return config.unnorm_key
    if config.unnorm_key is None and len(stats) == 1:
        return next(iter(stats))
    raise UserError(
        f"--unnorm_key {config.unnorm_key or '(none)'} for {config.pretrained_checkpoint}",
        expected=f"one of {', '.join(stats) or '(the checkpoint holds no action statistics)'}",
        remedy="Give the key of the data set that the policy was trained on.",
    )


class Service:
    """A policy and its batcher behind a websocket. `about` is what the first message says in "spvla"."""

    def __init__(
        self, policy: Policy, about: Mapping[str, Any], *, unnorm_key: str, center_crop: bool, batch_size: int
    ) -> None:
        self.policy, self.unnorm_key, self.center_crop = policy, unnorm_key, center_crop
        self.metadata = wire.pack({OWN: dict(about)})
        self.thread = ThreadPoolExecutor(1, "decode")
        self.batcher: Batcher[Observation, np.ndarray] = Batcher(self._decode, size=batch_size)

    async def listen(self, host: str, port: int) -> Server:
        """Begins to answer; port 0 takes a free one. Raises UserError where the address cannot be had."""
        try:
            return await listen(
                self.answer, host, port, compression=None, max_size=wire.MAX_BYTES, process_request=health
            )
        except OSError as e:
            raise UserError(
                f"--host {host} --port {port} ({e.strerror})",
                expected="an address of this machine that nobody listens at",
                remedy="Give another --port.",
            ) from e

    async def run(self, host: str, port: int) -> None:
        async with await self.listen(host, port) as server:
            print(f"serve  ws://{host}:{port}, ready", file=sys.stderr, flush=True)
            try:
                await server.serve_forever()
            finally:
                await self.batcher.close()

    async def answer(self, socket: ServerConnection) -> None:
        """One client, until it goes or sends what cannot be answered: then it gets a text that says why."""
        client = str(socket.id)
        try:
            await socket.send(self.metadata)
            async for data in socket:
                start = time.monotonic()
                actions = await self.batcher.submit(self.observation(data), client=client)
                timing = {"infer_ms": 1000 * (time.monotonic() - start)}
                await socket.send(wire.pack({ACTIONS_KEY: gripper_to_env(actions), "server_timing": timing}))
        except ConnectionClosed:
            pass
        except Exception as e:
            if not isinstance(e, UserError):
                traceback.print_exc()
            with suppress(ConnectionClosed):
                await socket.send(f"{type(e).__name__}: {e}" if not isinstance(e, SpvlaError) else str(e))
                await socket.close(INTERNAL_ERROR, "see the text before")
        finally:
            self.batcher.rest(client)

    def observation(self, data: str | bytes) -> Observation:
        """A message as the policy sees it. Raises UserError where it lacks what the policy needs."""
        message = wire.unpack(data) if isinstance(data, bytes) else None
        if not isinstance(message, dict) or not isinstance(message.get(PROMPT_KEY), str):
            raise UserError(
                f"a message without {PROMPT_KEY}",
                expected=f"a msgpack map with {PROMPT_KEY}, {', '.join(IMAGE_KEYS.values())} and {STATE_KEY}",
                remedy="Send what openpi's LIBERO client sends.",
            )
        needs = self.policy.needs
        images = [self._image(message, IMAGE_KEYS[camera]) for camera in needs.cameras]
        proprio = np.asarray(message.get(STATE_KEY), np.float32) if needs.proprio and STATE_KEY in message else None
        observation = Observation(images=tuple(images), instruction=message[PROMPT_KEY], proprio=proprio)
        check_observations([observation], needs)
        return observation

    def _image(self, message: Mapping[str, Any], key: str) -> np.ndarray:
        image = message.get(key)
        if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(
                f"a message whose {key} is {getattr(image, 'shape', type(image).__name__)}",
                expected="an upright image (H, W, 3) uint8",
                remedy="This policy looks at that camera: send its image.",
            )
        if message.get(PREPARED_KEY):
            return image
        if image.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
            return evaluation_image(image[::-1, ::-1], center_crop=self.center_crop)
        return crop_center(image) if self.center_crop else image

    async def _decode(self, observations: list[Observation]) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._act, observations)

    def _act(self, observations: list[Observation]) -> np.ndarray:
        return self.policy.act(observations, unnorm_key=self.unnorm_key)


def health(socket: ServerConnection, request: Request) -> Response | None:
    """Answers a machine that asks whether this one lives; everybody else goes on to the websocket."""
    return socket.respond(HTTPStatus.OK, "OK\n") if request.path == "/healthz" else None
