"""The store of a single manager: a dict, timers for leases, and a bounded history for watches.

Owns everything it stores; nothing survives the process. Watches read the shared history at their own pace, so a slow
one costs no memory: once the history has passed it by, it gets `Compacted`. All calls belong to one event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from itertools import islice
from typing import Literal

from cluster_manager.store.base import Compacted, Confirmed, Entry, Event, Lease, LeaseLost, StoreError

HISTORY_EVENTS = 4096


class _Lease:
    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.keys: set[str] = set()
        self.timer: asyncio.TimerHandle | None = None


class MemoryStore:
    """A `Store` in this process. `history_events` bounds how far back a watch may start."""

    def __init__(self, history_events: int = HISTORY_EVENTS) -> None:
        self._entries: dict[str, Entry] = {}
        self._lease_of: dict[str, Lease] = {}
        self._leases: dict[Lease, _Lease] = {}
        self._history: deque[Event] = deque(maxlen=history_events)
        self._revision = 0
        self._changed = asyncio.Event()
        self._closed = False

    async def grant(self, ttl_s: float) -> Lease:
        lease = uuid.uuid4().hex
        self._leases[lease] = _Lease(ttl_s)
        self._restart_timer(lease)
        return lease

    async def keepalive(self, lease: Lease) -> None:
        self._require(lease)
        self._restart_timer(lease)

    async def revoke(self, lease: Lease) -> None:
        self._end(lease)

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        if lease is not None:
            self._require(lease)
        self._detach(key)
        if lease is not None:
            self._lease_of[key] = lease
            self._leases[lease].keys.add(key)
        self._record("put", key, value)
        self._entries[key] = Entry(key, value, self._revision)
        return self._revision

    async def put_if(
        self, key: str, value: bytes, expected_mod_revision: int, lease: Lease | None = None
    ) -> int | None:
        entry = self._entries.get(key)
        if (entry.mod_revision if entry else 0) != expected_mod_revision:
            return None
        return await self.put(key, value, lease)

    async def delete(self, key: str) -> bool:
        return self._delete(key)

    async def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        return [self._entries[key] for key in sorted(self._entries) if key.startswith(prefix)], self._revision

    async def watch(
        self, prefix: str, from_revision: int, confirm_interval_s: float
    ) -> AsyncGenerator[Event | Confirmed, None]:
        wanted = from_revision
        while not self._closed:
            oldest = self._revision - len(self._history) + 1
            if not oldest <= wanted <= self._revision + 1:
                raise Compacted(f"revision {wanted} is outside of the history, {oldest} to {self._revision}")
            changed = self._changed
            for event in list(islice(self._history, wanted - oldest, None)):
                if event.key.startswith(prefix):
                    yield event
                wanted = event.revision + 1
            if wanted <= self._revision:
                continue
            try:
                async with asyncio.timeout(confirm_interval_s):
                    await changed.wait()
            except TimeoutError:
                yield Confirmed(wanted - 1)
        raise StoreError("the store is closed")

    async def compact(self, revision: int) -> None:
        while self._history and self._history[0].revision < revision:
            self._history.popleft()

    async def close(self) -> None:
        self._closed = True
        for held in self._leases.values():
            if held.timer:
                held.timer.cancel()
        self._leases.clear()
        self._wake()

    def _record(self, kind: Literal["put", "delete"], key: str, value: bytes) -> None:
        self._revision += 1
        self._history.append(Event(kind, key, value, self._revision))
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _require(self, lease: Lease) -> None:
        if lease not in self._leases:
            raise LeaseLost(lease)

    def _restart_timer(self, lease: Lease) -> None:
        held = self._leases[lease]
        if held.timer:
            held.timer.cancel()
        held.timer = asyncio.get_running_loop().call_later(held.ttl_s, self._end, lease)

    def _end(self, lease: Lease) -> None:
        held = self._leases.pop(lease, None)
        if held is None:
            return
        if held.timer:
            held.timer.cancel()
        for key in sorted(held.keys):
            self._delete(key)

    def _detach(self, key: str) -> None:
        lease = self._lease_of.pop(key, None)
        if lease in self._leases:
            self._leases[lease].keys.discard(key)

    def _delete(self, key: str) -> bool:
        self._detach(key)
        if self._entries.pop(key, None) is None:
            return False
        self._record("delete", key, b"")
        return True
