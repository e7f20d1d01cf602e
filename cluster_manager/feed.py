"""List-then-watch: the stream of `WatchEvent`s that one reader gets.

Owns the order of things: a snapshot, or a bookmark where the reader resumes; then every change once; a bookmark when
nothing happened for a while and the store has confirmed that; a new snapshot when the history between is gone. In an
outage of the store the stream is silent, so that its reader may look for another manager, and goes on after it from the
revision it had reached. There is no buffer: a reader that is slow takes the next change from the store later, or finds
it compacted and gets a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator

from cluster_manager.registry import Change, Registry
from cluster_manager.store import Compacted, Confirmed, StoreError
from pdserve.cluster_api import WatchEvent

log = logging.getLogger(__name__)

_RETRY_INTERVAL_S = 0.25


class Feed:
    """One reader's stream.

    Args:
        from_revision: the first change wanted; None starts with a snapshot.
        epoch: of `from_revision`; None trusts the reader.
    """

    def __init__(
        self, registry: Registry, bookmark_interval_s: float, from_revision: int | None = None, epoch: str | None = None
    ) -> None:
        self._registry = registry
        self._bookmark_interval_s = bookmark_interval_s
        self._resumes = from_revision is not None
        self._revision = (from_revision or 1) - 1
        self._epoch = epoch

    async def events(self) -> AsyncGenerator[WatchEvent, None]:
        """The stream, without end. Raises `StoreError` only before the first event."""
        yield await self._start()
        while True:
            try:
                async with contextlib.aclosing(self._changes()) as changes:
                    async for event in changes:
                        yield event
            except Compacted as error:
                log.info("a watch starts over: %s", error)
                self._resumes = False
            except StoreError as error:
                log.warning("a watch waits for the store: %s", error)
            yield await self._start_when_possible()

    async def _start(self) -> WatchEvent:
        epoch = await self._registry.epoch()
        if self._resumes and self._epoch in (None, epoch):
            self._epoch = epoch
            return self._bookmark()
        listed = await self._registry.workers(with_load=False)
        self._epoch, self._revision, self._resumes = epoch, listed.revision, True
        return WatchEvent(type="snapshot", revision=listed.revision, workers=listed.workers, epoch=epoch)

    async def _start_when_possible(self) -> WatchEvent:
        while True:
            await asyncio.sleep(_RETRY_INTERVAL_S)
            with contextlib.suppress(StoreError):
                return await self._start()

    async def _changes(self) -> AsyncGenerator[WatchEvent, None]:
        """Changes after `_revision`, and bookmarks in their silence."""
        changes = self._registry.changes(self._revision + 1, self._bookmark_interval_s)
        async with contextlib.aclosing(changes):
            async for change in changes:
                self._revision = change.revision
                yield self._bookmark() if isinstance(change, Confirmed) else _event(change)

    def _bookmark(self) -> WatchEvent:
        return WatchEvent(type="bookmark", revision=self._revision, epoch=self._epoch)


def _event(change: Change) -> WatchEvent:
    kind = "delete" if change.record is None else "put"
    return WatchEvent.model_validate(
        {"type": kind, "revision": change.revision, "worker_id": change.worker_id, "worker": change.record}
    )
