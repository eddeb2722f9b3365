"""Policies behind a websocket: the messages, our client against honest and broken servers, and our server."""

import asyncio
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import msgpack
import numpy as np
import pytest
from fakes import FakePolicy
from remote_parts import answering, serving

from spvla.errors import InfrastructureError, UserError
from spvla.policies import remote, wire
from spvla.policies.openvla.images import evaluation_image
from spvla.policies.registry import NO_FLAGS, PolicyFlags
from spvla.policies.remote import Connection, RemotePolicy, describe
from spvla.serve import Service
from spvla.types import Needs, Observation

CHUNK = np.arange(70, dtype=np.float64).reshape(10, 7) / 100
BOTH = ("agentview", "robot0_eye_in_hand")


def image(level: int = 0) -> np.ndarray:
    return np.full((224, 224, 3), level, np.uint8)


def observation(level: int = 0) -> Observation:
    return Observation(images=(image(level), image(level)), instruction="move", proprio=np.zeros(8, np.float32))


def test_arrays_and_numbers_survive_the_wire_as_openpi_writes_them() -> None:
    message = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(0.5), "c": ["x", 1, None, True]}
    back = wire.unpack(wire.pack(message))
    assert np.array_equal(back["a"], message["a"]) and back["a"].dtype == np.float32
    assert (back["b"], back["c"]) == (0.5, message["c"])
    raw = msgpack.unpackb(wire.pack({"a": np.zeros(2, np.uint8)}))
    assert raw["a"] == {b"__ndarray__": True, b"data": b"\0\0", b"dtype": "|u1", b"shape": [2]}


@pytest.mark.parametrize(
    "hostile",
    [
        {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "|O", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f8", b"shape": [2]},
        {b"__ndarray__": True, b"data": b"", b"dtype": "<f8", b"shape": [-1]},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "nonsense"},
    ],
)
def test_what_is_no_array_of_numbers_is_refused(hostile: dict) -> None:
    with pytest.raises(UserError, match="a message that cannot be read"):
        wire.unpack(msgpack.packb({"a": hostile}))


def test_a_server_that_says_nothing_is_asked_once_for_the_length_of_its_chunk() -> None:
    asked: list[dict] = []

    def answer(message: dict) -> dict:
        asked.append(message)
        return {"actions": CHUNK}

    with serving(answering(answer)) as url:
        found = describe(url, NO_FLAGS)
        needs = Needs(cameras=BOTH, proprio=True, chunk=10, execute=5, preprocessing="resized")
        assert found.description.needs == needs and not found.description.has_statistics
        assert describe(url, PolicyFlags(num_open_loop_steps=8)).description.needs.execute == 8
        with pytest.raises(UserError, match="--num_open_loop_steps 11"):
            describe(url, PolicyFlags(num_open_loop_steps=11))
    assert asked[0].keys() == {"prompt", "observation/image", "observation/wrist_image", "observation/state"}
    assert asked[0]["observation/image"].shape == (224, 224, 3) and asked[0]["observation/state"].shape == (8,)


def test_the_gripper_comes_in_liberos_sign_and_leaves_in_the_policys() -> None:
    chunk = np.zeros((3, 7))
    chunk[:, 6] = -1, 1, 0.5  # open, closed, half
    with serving(answering(lambda message: {"actions": chunk})) as url:
        policy = opened(url)
        assert policy.act([observation()], unnorm_key="")[0, :, 6].tolist() == [1, 0, 0.25]
        policy.close()


def opened(url: str) -> RemotePolicy:
    return remote.open(describe(url, NO_FLAGS).description, number=0)


def test_each_of_several_threads_has_a_connection_of_its_own() -> None:
    def answer(message: dict) -> dict:
        return {"actions": np.full((1, 7), message["observation/image"].mean())}

    with serving(answering(answer)) as url, ThreadPoolExecutor(4) as threads:
        policy = opened(url)
        answers = list(threads.map(lambda level: policy.act([observation(level)])[0, 0, 0], range(40)))
        policy.close()
    assert answers == list(range(40))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Traceback ...\nValueError: no such key", "answers with an error: ValueError: no such key"),
        ({"action": CHUNK}, "answers with no actions"),
        ({"actions": CHUNK[:, :6]}, r"answers with actions of shape \(10, 6\)"),
        (b"\xc1", "a message that cannot be read"),
    ],
)
def test_a_server_that_answers_otherwise_is_refused_before_any_trial(answer: object, message: str) -> None:
    with serving(answering(lambda _: answer)) as url, pytest.raises(UserError, match=message):
        describe(url, NO_FLAGS)


def test_an_answer_of_another_length_later_is_an_error_and_no_action() -> None:
    lengths = iter([10, 10, 9])
    with serving(answering(lambda _: {"actions": CHUNK[: next(lengths)]})) as url:
        policy = opened(url)
        policy.act([observation()])
        with pytest.raises(InfrastructureError, match="answers with 9 actions, at first with 10"):
            policy.act([observation()])


def test_an_answer_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 0.2)

    async def silent(socket: object) -> None:
        await socket.send(wire.pack({"spvla": {"name": "s", "needs": {"cameras": ["agentview"]}}}))
        await socket.wait_closed()

    with serving(silent) as url:
        policy = opened(url)
        seen = Observation(images=(image(),), instruction="move")
        with pytest.raises(InfrastructureError, match="has not answered within 0 s"):
            policy.act([seen])


def test_a_server_that_is_not_there_is_named_at_once() -> None:
    with pytest.raises(UserError, match="no policy server at ws://127.0.0.1:9"):
        describe("ws://127.0.0.1:9", NO_FLAGS, there_s=0)


@pytest.mark.parametrize("first", ["hello", b"\xc1", wire.pack([1])])
def test_a_server_of_another_protocol_is_named_at_once(first: str | bytes) -> None:
    async def other(socket: object) -> None:
        await socket.send(first)
        await socket.wait_closed()

    with serving(other) as url, pytest.raises(UserError, match="does not speak the protocol"):
        describe(url, NO_FLAGS)


def test_a_server_that_says_another_thing_of_itself_later_is_refused() -> None:
    says = [{"policy": "a"}]

    async def turncoat(socket: object) -> None:
        await socket.send(wire.pack(says[0]))
        async for _ in socket:
            await socket.send(wire.pack({"actions": CHUNK}))

    with serving(turncoat) as url:
        description = describe(url, NO_FLAGS).description
        says[0] = {"policy": "b"}
        with pytest.raises(UserError, match='says {"policy": "b"} of itself, and said {"policy": "a"} before'):
            remote.open(description, number=0)


def test_servers_of_two_policies_do_not_share_the_load() -> None:
    answers = [answering(lambda _: {"actions": CHUNK}, metadata={"policy": name}) for name in "ab"]
    with serving(answers[0]) as first, serving(answers[1]) as second, pytest.raises(UserError, match="servers of one"):
        describe(f"{first},{second}", NO_FLAGS)


class Echo(FakePolicy):
    """Its first action's first entry is the main image's brightness, the gripper open where that is even."""

    def act(self, observations: list[Observation], **rest: object) -> np.ndarray:
        actions = super().act(observations, **rest)
        for row, seen in zip(actions, observations, strict=True):
            row[0, 0], row[:, 6] = seen.images[0].mean(), seen.images[0].mean() % 2 == 0
        return actions


NEEDS = Needs(cameras=BOTH, proprio=True, chunk=4, execute=2)


def service(needs: Needs = NEEDS) -> Service:
    about = {"name": "echo", "needs": {**vars(needs), "cameras": list(needs.cameras)}}
    return Service(Echo(needs=needs), about, unnorm_key="k", center_crop=False, batch_size=4)


def test_our_server_says_what_its_policy_needs_and_its_client_sees_the_same_actions() -> None:
    with serving(service().answer) as url, ThreadPoolExecutor(4) as threads:
        found = describe(url, NO_FLAGS)
        assert (found.name, found.description.needs) == ("echo", NEEDS)
        policy = remote.open(found.description, number=0)
        answers = list(threads.map(lambda level: policy.act([observation(level)])[0], range(8)))
        policy.close()
    direct = Echo(needs=NEEDS).act([observation(level) for level in range(8)], unnorm_key="k")
    assert np.array_equal(answers, direct)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "a message without prompt"),
        ({"observation/image": None}, "a message whose observation/image is"),
        ({"observation/image": np.zeros((224, 224), np.uint8)}, r"observation/image is \(224, 224\)"),
        ({"observation/state": np.zeros(7, np.float32)}, r"proprio of shape \(7,\)"),
    ],
)
def test_our_server_tells_a_client_what_it_lacks_and_goes_on_with_the_others(change: dict, message: str) -> None:
    good = remote.message_of(NEEDS, observation(2))
    with serving(service().answer) as url, Connection(url, wait_s=1) as other:
        with Connection(url, wait_s=1) as bad:
            bad.socket.send(wire.pack({k: v for k, v in {**good, **change}.items() if v is not None}))
            answer = bad.socket.recv(timeout=5)
        assert isinstance(answer, str) and re.search(message, answer), answer
        assert other.ask(NEEDS, observation(2), timeout_s=5)[0, 0] == 2


def test_frames_of_another_size_go_the_evaluations_way_and_prepared_images_stay() -> None:
    seen = service()
    whole = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    message = {"prompt": "move", "observation/image": whole, "observation/wrist_image": whole}
    message["observation/state"] = np.zeros(8, np.float32)
    images = seen.observation(wire.pack(message)).images
    assert np.array_equal(images[0], evaluation_image(whole[::-1, ::-1], center_crop=False))
    ready = seen.observation(wire.pack(remote.message_of(NEEDS, observation(7)))).images
    assert np.array_equal(ready[1], image(7))


def test_a_machine_may_ask_whether_our_server_lives() -> None:
    async def scene() -> str:
        server = await service().listen("127.0.0.1", 0)
        port = next(iter(server.sockets)).getsockname()[1]
        url = f"http://127.0.0.1:{port}/healthz"
        said = await asyncio.get_running_loop().run_in_executor(None, lambda: urllib.request.urlopen(url).read())
        server.close()
        await server.wait_closed()
        return said.decode()

    assert asyncio.run(scene()) == "OK\n"


def test_metadata_is_compared_as_json_whatever_its_types() -> None:
    with serving(answering(lambda _: {"actions": CHUNK}, metadata={"a": np.arange(2), "b": 1})) as url:
        form = describe(url, NO_FLAGS).description.form
    assert json.loads(form.metadata) == {"a": [0, 1], "b": 1}
