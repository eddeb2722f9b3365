"""Pools of Ray actors that are kept alive: started a few at a time, replaced when they die, given up at last.

An actor that has no place on any machine waits for one, which is what an autoscaler starts machines for.

The driver's side of fault tolerance. Ray itself restarts nothing (max_restarts=0): a death is then seen in hundredths
of a second, and what was running is put back by whoever keeps the books.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import ray

Facts = TypeVar("Facts")

GIVE_UP_AFTER = 5  # deaths in a row
STARTS_AT_ONCE = 8
POLL_S = 0.2
LOG_HEADER = "--- process"  # begins what each process writes to its log


@dataclass
class ActorSlot(Generic[Facts]):
    """One place in a pool, filled by one actor after another under the same name."""

    name: str
    actor: Any = None
    placing: ray.ObjectRef | None = None  # resolves when a machine has taken the actor in
    starting: ray.ObjectRef | None = None  # resolves to the actor's facts
    facts: Facts | None = None  # known: the actor is ready
    since_s: float = 0.0  # when the actor was asked for; once it has a place, when it was started
    deaths: int = 0  # in a row
    wait_until_s: float = 0.0
    given_up: str = ""  # why

    @property
    def ready(self) -> bool:
        return self.facts is not None


@dataclass
class ActorPool(Generic[Facts]):
    """`launch(name)` asks for an actor; `start(actor)` returns a reference that resolves when it can work."""

    kind: str
    launch: Callable[[str], Any]
    start: Callable[[Any], ray.ObjectRef]
    start_timeout_s: float
    slots: list[ActorSlot[Facts]] = field(default_factory=list)
    any_started: bool = False  # one has been ready: deaths are bad luck, not a fault of every machine
    last_death: str = ""
    placed_at_s: float = field(default_factory=time.monotonic)  # when last an actor had a place, or none was asked for

    def grow_to(self, size: int) -> None:
        while len(self.slots) < size:
            self.slots.append(ActorSlot(name=f"{self.kind}-{len(self.slots)}"))

    def ready(self) -> list[ActorSlot[Facts]]:
        return [s for s in self.slots if s.ready]

    def alive(self) -> bool:
        """Somebody works, or may yet. Where nobody ever could, a round of falls is enough."""
        if not self.any_started and sum(s.deaths for s in self.slots) >= GIVE_UP_AFTER + STARTS_AT_ONCE:
            return False
        return any(not s.given_up for s in self.slots)

    def waiting(self, seconds: float = 0) -> list[ActorSlot[Facts]]:
        """Those that have waited for a machine for so long."""
        asked = time.monotonic() - seconds
        return [s for s in self.slots if s.placing is not None and s.since_s <= asked]

    def without_a_place(self, seconds: float) -> bool:
        """For so long no actor has had a place, and some wait for one."""
        now = time.monotonic()
        if not self.waiting() or any(s.actor is not None and s.placing is None for s in self.slots):
            self.placed_at_s = now
        return now - self.placed_at_s > seconds

    def fill(self, wanted: int) -> None:
        """Asks for actors in empty slots, up to `wanted` in all; who still waits for a place beyond that is let go."""
        now = time.monotonic()
        if not any(s.actor is not None for s in self.slots):
            self.placed_at_s = now  # none was asked for yet
        surplus = sum(s.actor is not None for s in self.slots) - wanted
        for slot in self.waiting()[::-1][: max(0, surplus)]:
            self.retire(slot)
        empty = [s for s in self.slots if s.actor is None and not s.given_up and s.wait_until_s <= now]
        for slot in empty[: max(0, -surplus)]:
            slot.actor = self.launch(slot.name)
            slot.placing, slot.since_s = slot.actor.__ray_ready__.remote(), now

    def started(self) -> Iterator[tuple[ActorSlot[Facts], str]]:
        """Starts those that have a place; yields (slot, "") for each now ready, (slot, why) for each that died."""
        yield from self._start_placed()
        for slot in [s for s in self.slots if s.starting is not None]:
            if ray.wait([slot.starting], timeout=0)[0]:
                reference, slot.starting = slot.starting, None
                try:
                    slot.facts = ray.get(reference)
                    self.any_started = True
                    yield slot, ""
                except ray.exceptions.RayError as e:
                    yield slot, self.lost(slot, last_line(str(e)))
            elif time.monotonic() - slot.since_s > self.start_timeout_s:
                yield slot, self.lost(slot, f"not ready within {self.start_timeout_s:.0f} s")

    def _start_placed(self) -> Iterator[tuple[ActorSlot[Facts], str]]:
        """A few at a time: many at once starve each other of disk and memory."""
        room = STARTS_AT_ONCE - sum(s.starting is not None for s in self.slots)
        placed = [s for s in self.waiting() if ray.wait([s.placing], timeout=0)[0]]
        for slot in placed[: max(0, room)]:
            try:
                ray.get(slot.placing)
                slot.placing, slot.starting = None, self.start(slot.actor)
                slot.since_s = time.monotonic()
            except ray.exceptions.RayError as e:
                yield slot, self.lost(slot, last_line(str(e)))

    def lost(self, slot: ActorSlot[Facts], why: str) -> str:
        """The actor is dead or must go: empties its slot, and counts it. Returns `why`."""
        self.retire(slot)
        slot.deaths += 1
        slot.wait_until_s = time.monotonic() + min(10.0, 0.1 * 2**slot.deaths)
        self.last_death = f"{slot.name} died {slot.deaths} times in a row, at last of: {why}"
        if slot.deaths >= GIVE_UP_AFTER:
            slot.given_up = self.last_death
        return why

    def retire(self, slot: ActorSlot[Facts]) -> None:
        """Ends the actor, if it lives, without blame."""
        if slot.actor is not None:
            ray.kill(slot.actor)
        slot.actor = slot.placing = slot.starting = slot.facts = None

    def dismiss(self, slot: ActorSlot[Facts], why: str) -> None:
        """Ends the actor for good."""
        self.retire(slot)
        slot.given_up = why

    def close(self) -> None:
        for slot in self.slots:
            self.retire(slot)


def tail(log: Path | None, lines: int = 60) -> str:
    """The last lines that an actor's latest process wrote to its log, where this machine sees it."""
    try:
        text = log.read_text(errors="replace") if log else ""
    except OSError:
        return ""
    return "\n".join(text[text.rfind(f"{LOG_HEADER} ") :].splitlines()[-lines:])


def cause_of_death(log: Path | None) -> str:
    """What Python's fault handler wrote of an actor's latest process: "Fatal Python error: ..." or nothing."""
    found = (line for line in tail(log, 1000).splitlines() if line.startswith("Fatal Python error"))
    return next(found, "")


def first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no message"


def last_line(text: str) -> str:
    """Of a remote traceback: the exception itself; of Ray's advice on dead actors, the beginning."""
    return text.strip().splitlines()[-1].strip()[:160] if text.strip() else "no message"
