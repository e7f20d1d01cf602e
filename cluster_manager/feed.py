"""List-then-watch: the stream of `WatchEvent`s that one reader gets.

Owns the order of things: a snapshot, or a bookmark where the reader resumes; then every change once; a bookmark when
nothing happened for a while; a new snapshot when the history between is gone. An outage of the store shows as silence
(with bookmarks), and the stream goes on after it from the revision it had reached. There is no buffer: a reader that
is slow takes the next change from the store later, or finds it compacted and gets a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

from cluster_manager.registry import Change, Registry
from cluster_manager.store import Compacted, StoreError
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
            async with contextlib.aclosing(self._restart()) as restart:
                async for event in restart:
                    yield event

    async def _start(self) -> WatchEvent:
        epoch = await self._registry.epoch()
        if self._resumes and self._epoch in (None, epoch):
            self._epoch = epoch
            return self._bookmark()
        listed = await self._registry.workers()
        self._epoch, self._revision, self._resumes = epoch, listed.revision, True
        return WatchEvent(type="snapshot", revision=listed.revision, workers=listed.workers, epoch=epoch)

    async def _restart(self) -> AsyncGenerator[WatchEvent, None]:
        """Bookmarks until the store answers, then what the stream goes on with."""
        started = asyncio.ensure_future(self._start_when_possible())
        async with contextlib.aclosing(self._silence(started)) as bookmarks:
            async for bookmark in bookmarks:
                yield bookmark
        yield started.result()

    async def _start_when_possible(self) -> WatchEvent:
        while True:
            await asyncio.sleep(_RETRY_INTERVAL_S)
            with contextlib.suppress(StoreError):
                return await self._start()

    async def _changes(self) -> AsyncGenerator[WatchEvent, None]:
        """Changes after `_revision`, and bookmarks in their silence."""
        async with contextlib.aclosing(self._registry.changes(self._revision + 1)) as changes:
            while True:
                pending = asyncio.ensure_future(anext(changes))
                async with contextlib.aclosing(self._silence(pending)) as bookmarks:
                    async for bookmark in bookmarks:
                        yield bookmark
                change = pending.result()
                self._revision = change.revision
                yield _event(change)

    async def _silence(self, pending: asyncio.Future[Any]) -> AsyncGenerator[WatchEvent, None]:
        """A bookmark every interval until `pending` is done; cancels it when the reader goes first."""
        try:
            while not (await asyncio.wait({pending}, timeout=self._bookmark_interval_s))[0]:
                yield self._bookmark()
        finally:
            if not pending.done():
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    def _bookmark(self) -> WatchEvent:
        return WatchEvent(type="bookmark", revision=self._revision, epoch=self._epoch)


def _event(change: Change) -> WatchEvent:
    kind = "delete" if change.record is None else "put"
    return WatchEvent.model_validate(
        {"type": kind, "revision": change.revision, "worker_id": change.worker_id, "worker": change.record}
    )
