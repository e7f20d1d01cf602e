"""The live workers, as the store has them.

Owns the keys below `/<cluster_name>/` and what they mean; holds no state of its own, so any number of registries may
share a store and any of them answers any worker. A worker is the key `workers/<worker_id>`, attached to the lease of
its registration: when the lease lapses, the key is gone. The key holds the lease's id, so a heartbeat of a replaced
registration is told apart from the newer one's. `epoch` is written once into an empty store and says whether
revisions of two moments can be compared.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from pydantic import ValidationError

from cluster_manager.store import Entry, LeaseLost, Store, StoreError
from pdserve.cluster_api import HeartbeatRequest, Schema, WorkerInfo, WorkerList, WorkerRecord
from pdserve.errors import ModelMismatch, UnknownLease, UnknownWorker
from pdserve.protocol import is_another_model

log = logging.getLogger(__name__)

_ATTEMPTS = 8


class StoredWorker(Schema):
    """The value of a worker's key."""

    lease_id: str
    record: WorkerRecord


class Change(NamedTuple):
    """One change of one worker; `record` is None when it is gone."""

    revision: int
    worker_id: str
    record: WorkerRecord | None


class Registry:
    """Membership of one cluster. All methods raise `StoreError` when the store does not answer."""

    def __init__(self, store: Store, cluster_name: str, ttl_s: float) -> None:
        self._store = store
        self._prefix = f"/{cluster_name}/workers/"
        self._epoch_key = f"/{cluster_name}/epoch"
        self._ttl_s = ttl_s

    async def register(self, info: WorkerInfo) -> str:
        """Add a worker, ready, or replace it if its id is taken; returns the id of its lease.

        Raises:
            ModelMismatch: the live workers serve another model.
        """
        await self._check_model(info)  # before anybody has seen it
        key = self._prefix + info.worker_id
        replaced = await self._find(info.worker_id)
        lease = await self._store.grant(self._ttl_s)
        stored = StoredWorker(lease_id=lease, record=WorkerRecord(info=info, state="ready"))
        try:
            await self._store.put(key, _encode(stored), lease)
        except LeaseLost:
            raise StoreError("the lease lapsed before the worker was written") from None
        if replaced:
            await self._store.revoke(replaced[0].lease_id)
        try:
            await self._check_model(info)  # after: of two that came at once, each sees the other, and comes again later
        except ModelMismatch:
            await self._store.revoke(lease)
            raise
        return lease

    async def heartbeat(self, worker_id: str, beat: HeartbeatRequest) -> WorkerRecord:
        """Renew a worker's lease and take note of its load; the store is written only if the load has changed.

        Raises:
            UnknownLease: it has lapsed, or the worker has been registered anew.
        """
        try:
            await self._store.keepalive(beat.lease_id)
            return await self._update(worker_id, {"load": beat.load}, beat.lease_id, beat.incarnation)
        except (LeaseLost, UnknownWorker):
            raise UnknownLease(f"worker {worker_id} holds no lease {beat.lease_id}", "lease_id") from None

    async def drain(self, worker_id: str) -> WorkerRecord:
        """Mark a worker as draining; it is told with its next heartbeat. Raises `UnknownWorker`."""
        try:
            return await self._update(worker_id, {"state": "draining"})
        except LeaseLost:
            raise _unknown(worker_id) from None

    async def deregister(self, worker_id: str, lease_id: str) -> None:
        """Remove a worker at once. Raises `UnknownLease` if this registration is not the current one."""
        found = await self._find(worker_id)
        if found is None or found[0].lease_id != lease_id:
            raise UnknownLease(f"worker {worker_id} holds no lease {lease_id}", "lease_id")
        await self._store.revoke(lease_id)

    async def worker(self, worker_id: str) -> WorkerRecord:
        """One live worker. Raises `UnknownWorker`."""
        found = await self._find(worker_id)
        if found is None:
            raise _unknown(worker_id)
        return found[0].record

    async def workers(self) -> WorkerList:
        """All live workers, by id."""
        entries, revision = await self._store.scan(self._prefix)
        stored = [_decode(entry.key, entry.value) for entry in entries]
        return WorkerList(revision=revision, workers=[worker.record for worker in stored if worker])

    async def changes(self, from_revision: int) -> AsyncGenerator[Change, None]:
        """Changes from a revision on, as `Store.watch` gives them and with its errors."""
        async with aclosing(self._store.watch(self._prefix, from_revision)) as events:
            async for event in events:
                worker_id = event.key.removeprefix(self._prefix)
                stored = _decode(event.key, event.value) if event.kind == "put" else None
                yield Change(event.revision, worker_id, stored.record if stored else None)

    async def epoch(self) -> str:
        """The name of the store's life: another value means that its revisions have started over."""
        for _ in range(_ATTEMPTS):
            entry = await self._store.get(self._epoch_key)
            if entry:
                return entry.value.decode(errors="replace")
            await self._store.put_if(self._epoch_key, uuid.uuid4().hex.encode(), expected_mod_revision=0)
        raise StoreError("the store does not keep what is written to it")

    async def _check_model(self, info: WorkerInfo) -> None:
        """Raises ModelMismatch if a live worker is of another model than a new one, as far as both tell."""
        for other in (record.info for record in (await self.workers()).workers):
            others = is_another_model(info.model_fingerprint, other.model_fingerprint)
            if others and other.worker_id != info.worker_id:
                raise ModelMismatch(
                    f"worker {info.worker_id} serves the model with fingerprint {info.model_fingerprint} "
                    f"({info.model}), the live worker {other.worker_id} that with {other.model_fingerprint} "
                    f"({other.model})",
                    "model_fingerprint",
                )

    async def _find(self, worker_id: str) -> tuple[StoredWorker, Entry] | None:
        entry = await self._store.get(self._prefix + worker_id)
        stored = _decode(entry.key, entry.value) if entry else None
        return (stored, entry) if stored and entry else None

    async def _update(
        self, worker_id: str, fields: dict[str, object], lease_id: str | None = None, incarnation: str | None = None
    ) -> WorkerRecord:
        """Change fields of a record by compare-and-swap; a given lease or incarnation must be the current one."""
        for _ in range(_ATTEMPTS):
            found = await self._find(worker_id)
            if found is None:
                raise _unknown(worker_id)
            stored, entry = found
            if lease_id not in (None, stored.lease_id) or incarnation not in (None, stored.record.info.incarnation):
                raise LeaseLost(lease_id)
            record = stored.record.model_copy(update=fields)
            if record == stored.record:
                return record
            value = _encode(StoredWorker(lease_id=stored.lease_id, record=record))
            if await self._store.put_if(entry.key, value, entry.mod_revision, stored.lease_id) is not None:
                return record
        raise StoreError(f"worker {worker_id} is changed by others all the time")


def _unknown(worker_id: str) -> UnknownWorker:
    return UnknownWorker(f"no live worker {worker_id}", "worker_id")


def _encode(stored: StoredWorker) -> bytes:
    return stored.model_dump_json().encode()


def _decode(key: str, value: bytes) -> StoredWorker | None:
    """The worker in a key; None for what another version wrote, which must not hide the others."""
    try:
        return StoredWorker.model_validate_json(value)
    except ValidationError as error:
        log.warning("%s can't be read: %s", key, error)
        return None
