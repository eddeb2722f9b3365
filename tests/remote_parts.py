"""A policy server in a thread of the test's process."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from websockets.asyncio.server import ServerConnection, serve

from spvla.policies import wire

Handler = Callable[[ServerConnection], Awaitable[None]]


@contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """Its address, for as long as the block lasts."""
    ready: Future[tuple[str, Callable[[], None]]] = Future()

    async def run() -> None:
        over, loop = asyncio.Event(), asyncio.get_running_loop()
        async with serve(handler, "127.0.0.1", 0, max_size=wire.MAX_BYTES) as server:
            host, port = next(iter(server.sockets)).getsockname()[:2]
            ready.set_result((f"ws://{host}:{port}", lambda: loop.call_soon_threadsafe(over.set)))
            await over.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    address, end = ready.result(timeout=10)
    try:
        yield address
    finally:
        end()
        thread.join(10)


def answering(answer: Callable[[dict], object], metadata: object = None) -> Handler:
    """A server as simple as openpi's: what it says of itself, then `answer(message)` for each message."""

    async def handle(socket: ServerConnection) -> None:
        await socket.send(wire.pack({} if metadata is None else metadata))
        async for data in socket:
            reply = answer(wire.unpack(data))
            await socket.send(reply if isinstance(reply, str | bytes) else wire.pack(reply))

    return handle
