"""Keeps the store's history short.

A store like etcd remembers every change until it is told to forget. Each interval one of the managers writes a mark,
and has everything before the mark of the interval before forgotten. So a watch can resume from anything that it saw
within an interval; one that comes later starts over with a list. Forgetting what is before a mark loses no event, for
no watch of workers needs to see the mark. A store that nobody has changed in between is left alone.
"""

from __future__ import annotations

import asyncio
import logging

from cluster_manager.store import Store, StoreError

log = logging.getLogger(__name__)

INTERVAL_S = 300.0


class Compactor:
    """Compacts one cluster's store while `run` runs. Of several managers, one does it each time."""

    def __init__(self, store: Store, cluster_name: str, interval_s: float = INTERVAL_S) -> None:
        self._store = store
        self._key = f"/{cluster_name}/history-mark"
        self._interval_s = interval_s

    async def run(self) -> None:
        """Compact each interval until cancelled; an outage of the store puts it off."""
        mark: int | None = None
        while True:
            try:
                mark = await self._step(mark)
            except StoreError as error:
                log.info("the store's history could not be compacted: %s", error)
            await asyncio.sleep(self._interval_s)

    async def _step(self, seen: int | None) -> int:
        """The revision of the newest mark. If that is still the one `seen` an interval ago, a new one is made first."""
        entries, revision = await self._store.scan(self._key)
        mark = entries[0].mod_revision if entries else 0
        if mark != seen or mark == revision:
            return mark
        new = await self._store.put_if(self._key, b"", mark)
        if new is None:  # another manager was faster
            return mark
        if mark:
            await self._store.compact(mark)
        return new
