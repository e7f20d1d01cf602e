"""Who the workers are: one link for each, kept in step with the manager's view.

Owns the links and the tasks that run them, and keeps requests from workers of another model (`ModelGuard`). Does not
own what a worker has to do (`Load`) or who gets a request (`Fleet`).

Life cycle: `follow` for as long as the manager tells of changes, then `close`. The manager is not needed to serve:
while it is away the last view stands, and after a restart its first, empty snapshot takes nobody out whose socket is
alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection

import aiohttp

from pdserve.addresses import host_of_url
from pdserve.cluster_api import WatchEvent, WorkerRecord
from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink
from proxy.fleet.model_guard import ModelGuard

log = logging.getLogger(__name__)


class Membership:
    """The workers this proxy is connected to.

    Args:
        session: makes the connections.
        sender: this proxy's name towards workers.
        fingerprint: of this proxy's model; None if it has no weights to tell by.
        need_transceivers: whether a worker that can't hand KV over is of no use.
        on_change: called when a worker has come, gone or changed its state.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        sender: str,
        fingerprint: str | None,
        need_transceivers: bool,
        on_change: Callable[[], None],
    ) -> None:
        self._session = session
        self._sender = sender
        self._model = ModelGuard(fingerprint)
        self._need_transceivers = need_transceivers
        self._on_change = on_change
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}

    @property
    def links(self) -> Collection[WorkerLink]:
        """Every worker with a socket or a record, superseded ones included."""
        return self._tasks.keys()

    @property
    def num_of_other_models(self) -> int:
        """How many workers get no requests because they are of another model."""
        return sum(not self._model.admits(link.info) for link in self._links.values())

    def placeable(self, role: Role) -> list[WorkerLink]:
        """The workers of `role` that may take a request now."""
        return [link for link in self._links.values() if link.info.role == role and self._usable(link)]

    async def follow(self, events: AsyncIterator[WatchEvent]) -> None:
        """Apply the manager's events for as long as they come."""
        async for event in events:
            self.apply(event)

    def apply(self, event: WatchEvent) -> None:
        """Take one event of the manager over."""
        if event.type == "bookmark":
            return
        if event.type == "snapshot":
            records = event.workers or []
            present = {record.info.worker_id for record in records}
            for worker_id in self._links.keys() - present:
                self._links[worker_id].unconfirm()
            for record in records:
                self._put(record)
        elif event.type == "put" and event.worker is not None:
            self._put(event.worker)
        elif event.type == "delete" and event.worker_id in self._links:
            self._links[event.worker_id].unconfirm()
        self._changed()

    async def close(self) -> None:
        """Close all sockets; workers abort what was open on them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _usable(self, link: WorkerLink) -> bool:
        able = link.info.kv is not None or not self._need_transceivers
        return able and link.placeable and self._model.admits(link.info)

    def _put(self, record: WorkerRecord) -> None:
        worker_id = record.info.worker_id
        try:
            host_of_url(record.info.url)  # prompts go there, whatever manager it comes from
        except ValueError as error:
            log.error("worker %s gets no requests: its url %s", worker_id, error)
            return
        link = self._links.get(worker_id)
        if link is not None:
            if link.update(record):
                return
            link.retire()
        link = WorkerLink(record, self._session, self._sender, self._changed)
        self._links[worker_id] = link
        self._tasks[link] = asyncio.create_task(self._run(link), name=f"link-{worker_id}")

    async def _run(self, link: WorkerLink) -> None:
        """The root of a link's task."""
        try:
            await link.run()
        except Exception:
            log.exception("the link to %s failed", link.worker_id)
        finally:
            del self._tasks[link]
            if self._links.get(link.worker_id) is link:
                del self._links[link.worker_id]
            self._changed()

    def _changed(self) -> None:
        """A worker has come, gone or changed its state, and with it perhaps the model that workers must serve."""
        # One that drains is on its way out, and must not keep those of the next model waiting.
        self._model.review([link.info for link in self._links.values() if link.confirmed or link.placeable])
        self._on_change()
