"""All workers, kept in step with the manager's view.

Owns one `WorkerLink` per worker and the tasks that run them. The manager is not needed to serve: while it is away the
last view stands, and after a restart its first, empty snapshot takes nobody out whose socket is alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import NamedTuple

import aiohttp

from pdserve.addresses import host_of_url
from pdserve.cluster_api import WatchEvent, WorkerRecord
from pdserve.config import ClusterConfig
from pdserve.errors import NotReady
from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink
from proxy.fleet.model_guard import ModelGuard
from proxy.fleet.placement import LocalPrefill, LocalReason, Placer

log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """Who serves one attempt; at least one of the two. Without a context worker, the other does both phases.

    `local` says why it does although the configuration has context workers.
    """

    context: WorkerLink | None
    generation: WorkerLink | None
    local: LocalReason | None = None


class Fleet:
    """The workers this proxy is connected to.

    Args:
        config: names the placement policy, whether there are context workers at all, and which prompts need none.
        session: makes the connections.
        sender: this proxy's name towards workers.
        fingerprint: of this proxy's model; None if it has no weights to tell by.
    """

    def __init__(
        self, config: ClusterConfig, session: aiohttp.ClientSession, sender: str, fingerprint: str | None = None
    ) -> None:
        policy = config.proxy.placement
        self.disaggregated = config.context_servers.num_instances > 0
        self._placers: dict[Role, Placer] = {
            "context": Placer.for_context(policy),
            "generation": Placer.for_generation(policy),
        }
        self._local = LocalPrefill(config.conditional_disagg_config)
        self._model = ModelGuard(fingerprint)
        self._session = session
        self._sender = sender
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        self._waiters: dict[Callable[[], None], None] = {}

    @property
    def links(self) -> Collection[WorkerLink]:
        """Every worker with a socket or a record, superseded ones included."""
        return self._tasks.keys()

    def placeable(self, role: Role) -> list[WorkerLink]:
        """The workers of `role` that may take a request now."""
        return [link for link in self._links.values() if link.info.role == role and self._usable(link)]

    def _usable(self, link: WorkerLink) -> bool:
        has_transceiver = link.info.kv is not None or not self.disaggregated
        return link.placeable and has_transceiver and self._model.admits(link.info)

    @property
    def num_of_other_models(self) -> int:
        """How many workers get no requests because they are of another model."""
        return sum(not self._model.admits(link.info) for link in self._links.values())

    def place(self, num_tokens: int, needs_generation: bool, avoid: Collection[str] = ()) -> Placement:
        """Workers for one attempt.

        Args:
            num_tokens: what is to be computed before the first new token: the prompt, and what there is of its output.
            needs_generation: whether the attempt may go on after its first token.
            avoid: ids of workers to take only if there are no others.

        Raises:
            NotReady: no worker of a role that is needed is connected and ready.
        """
        generations = self.placeable("generation")
        if not self.disaggregated:
            return Placement(None, self._pick("generation", generations, avoid))
        contexts = self.placeable("context")
        # A generation worker that is to be avoided does not get both phases while a context worker could do one.
        able = [link for link in generations if link.worker_id not in avoid] if contexts else generations
        # Before a context worker is picked: it would be a turn in which that worker gets nothing.
        if needs_generation and able and self._local.is_short(num_tokens):
            return Placement(None, self._pick("generation", able, avoid), "short")
        context = self._placers["context"].pick(contexts, avoid)
        reason, takers = self._local.takers(None if context is None or context.worker_id in avoid else context, able)
        if reason is not None:
            return Placement(None, self._pick("generation", takers, avoid), reason)
        if context is None:
            raise _not_ready("context")
        return Placement(context, self._pick("generation", generations, avoid) if needs_generation else None)

    def max_seq_len(self) -> int:
        """Prompt and output tokens of one request that every ready worker takes.

        Raises:
            NotReady: no worker of a role that every request needs is connected and ready.
        """
        generations = self.placeable("generation")
        contexts = self.placeable("context") if self.disaggregated else []
        if self.disaggregated and not contexts and not self._local.is_possible:
            raise _not_ready("context")
        if not generations:
            raise _not_ready("generation")
        return min(link.info.max_seq_len for link in (*contexts, *generations))

    def call_on_change(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when a worker has come, gone or changed its state."""
        self._waiters[callback] = None

    def cancel_call(self, callback: Callable[[], None]) -> None:
        self._waiters.pop(callback, None)

    async def follow(self, events: AsyncIterator[WatchEvent]) -> None:
        """Apply the manager's events for as long as they come."""
        async for event in events:
            self.apply(event)

    def apply(self, event: WatchEvent) -> None:
        """Take one event of the manager over."""
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
        if self._review_models():
            self._changed()

    async def close(self) -> None:
        """Close all sockets; workers abort what was open on them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _pick(self, role: Role, links: Sequence[WorkerLink], avoid: Collection[str]) -> WorkerLink:
        link = self._placers[role].pick(links, avoid)
        if link is None:
            raise _not_ready(role)
        return link

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
            if self._review_models():
                self._changed()

    def _review_models(self) -> bool:
        """Whether the model that workers must serve is another one now."""
        # One that drains is on its way out, and must not keep those of the next model waiting.
        there = [link.info for link in self._links.values() if link.confirmed or link.placeable]
        return self._model.review(there)

    def _changed(self) -> None:
        self._review_models()
        waiters, self._waiters = self._waiters, {}
        for callback in waiters:
            callback()


def _not_ready(role: Role) -> NotReady:
    return NotReady(f"no {role} worker is connected and ready")
