"""What the manager asks of a store: a small key-value space with leases, revisions and watches.

Owns the interface only; `memory` and `etcd` implement it and pass one conformance suite. The semantics are etcd's:
every change of a key gets the next revision of the whole store, and one revision changes one key. A key attached to
a lease is deleted when the lease lapses or is revoked; writing it again attaches it to the lease of that write alone.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Literal, NamedTuple, Protocol

from pdserve.errors import StoreError

Lease = str


class LeaseLost(Exception):
    """The lease has lapsed, was revoked, or never was."""


class Compacted(Exception):
    """The history from the wanted revision on is gone, or was never this store's: scan again."""


class Entry(NamedTuple):
    key: str
    value: bytes
    mod_revision: int


class Event(NamedTuple):
    kind: Literal["put", "delete"]
    key: str
    value: bytes
    revision: int


class Confirmed(NamedTuple):
    """The store has answered that a watch is alive; `revision` is how far the watch has come."""

    revision: int


class Store(Protocol):
    """Every method may raise `StoreError`: the store did not answer in time, and whether it acted is unknown."""

    async def grant(self, ttl_s: float) -> Lease:
        """A lease that lapses `ttl_s` after its last keepalive, or up to about a second later."""

    async def keepalive(self, lease: Lease) -> None:
        """Start the lease's time anew. Raises `LeaseLost`."""

    async def revoke(self, lease: Lease) -> None:
        """End the lease and delete its keys; nothing happens if it is lost already."""

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        """Write a key; returns the revision. Raises `LeaseLost`."""

    async def put_if(
        self, key: str, value: bytes, expected_mod_revision: int, lease: Lease | None = None
    ) -> int | None:
        """Write a key if it is still at `expected_mod_revision` (0: if it does not exist).

        Returns the revision, or None if the key has changed. Raises `LeaseLost`.
        """

    async def delete(self, key: str) -> bool:
        """Delete a key; says whether there was one."""

    async def get(self, key: str) -> Entry | None:
        """A key as of now: what any writer was told is done, is seen."""

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        """All keys below `prefix`, and the revision at which they were so."""

    def watch(
        self, prefix: str, from_revision: int, confirm_interval_s: float
    ) -> AsyncGenerator[Event | Confirmed, None]:
        """Every change below `prefix` from `from_revision` on (inclusive), once each and in order, without end.

        After `confirm_interval_s` without a change the store is asked whether it still watches, and its answer is a
        `Confirmed`. Raises `Compacted`; `StoreError` when the connection is lost, the store does not answer, or it is
        cut off from those that it keeps its contents with (the caller watches again, from the revision after the last
        one it saw). A reader that does not keep up holds back nobody else: in the end it gets `Compacted`.
        """

    async def compact(self, revision: int) -> None:
        """Forget the changes before `revision`, which must be that of a change that no watch needs to see."""

    async def close(self) -> None:
        """Let go of connections and timers; watches end."""


__all__ = ["Compacted", "Confirmed", "Entry", "Event", "Lease", "LeaseLost", "Store", "StoreError"]
