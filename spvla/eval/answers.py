"""Answers that actors owe the driver: all that it asks of Ray once an actor is there.

A driver may be given another object with these four methods, which answers without a cluster (bench/driver.py).
"""

from dataclasses import dataclass
from typing import Any

import ray


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call returned, or (`error`) what it died of."""

    value: Any = None
    error: str = ""


class Answers:
    """At most one call of each actor is awaited here at a time."""

    def __init__(self) -> None:
        self._owner_of: dict[ray.ObjectRef, str] = {}  # in the order in which they were asked
        self._reference_of: dict[str, ray.ObjectRef] = {}

    def expect(self, owner: str, reference: ray.ObjectRef) -> None:
        self._owner_of[reference], self._reference_of[owner] = owner, reference

    def forget(self, owner: str) -> None:
        """Whatever the actor answers, it comes too late."""
        if (reference := self._reference_of.pop(owner, None)) is not None:
            del self._owner_of[reference]

    def take(self, *, timeout_s: float, most: int) -> list[tuple[str, Answer]]:
        """(owner, answer) of those that are here, after waiting for a first one; the longest awaited go first."""
        references = list(self._owner_of)
        if not references or not ray.wait(references, num_returns=1, timeout=timeout_s)[0]:
            return []
        ready, _ = ray.wait(references, num_returns=min(most, len(references)), timeout=0)
        taken = [(self._owner_of[reference], self._get(reference)) for reference in ready]
        for owner, _ in taken:
            self.forget(owner)
        return taken

    def poll(self, reference: ray.ObjectRef) -> Answer | None:
        """The answer to a single call, if it is here."""
        return self._get(reference) if ray.wait([reference], timeout=0)[0] else None

    def _get(self, reference: ray.ObjectRef) -> Answer:
        try:
            return Answer(value=ray.get(reference))
        except ray.exceptions.RayError as e:
            return Answer(error=str(e) or type(e).__name__)
