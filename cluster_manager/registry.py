"""The live workers, as the store has them.

Owns the keys below `/<cluster_name>/` and what they mean; holds no state of its own but the loads that heartbeats tell,
so any number of registries may share a store and any of them answers any worker. A worker is the key
`workers/<worker_id>`, attached to the lease of its registration: when the lease lapses, the key is gone. The key holds
the lease's id, so a heartbeat of a replaced registration is told apart from the newer one's. Heartbeats write nothing.
`epoch` is written once into an empty store and says whether revisions of two moments can be compared.

Managers of the first release refuse a key whose value has a field that they do not know. So `workers/<worker_id>` holds
what they know, and the registration as a whole is beside it, in `workers-whole/<lease_id>`, under the same lease.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import NamedTuple

from pydantic import ValidationError

from cluster_manager.loads import Loads
from cluster_manager.store import Confirmed, Entry, LeaseLost, Store, StoreError
from pdserve.cluster_api import HeartbeatRequest, Schema, WorkerInfo, WorkerList, WorkerRecord
from pdserve.cluster_versions import FIRST_VERSION, to_json
from pdserve.errors import ModelMismatch, Superseded, UnknownLease, UnknownWorker
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
        self._whole_prefix = f"/{cluster_name}/workers-whole/"
        self._epoch_key = f"/{cluster_name}/epoch"
        self._ttl_s = ttl_s
        self._loads = Loads(ttl_s)

    async def register(self, info: WorkerInfo) -> str:
        """Add a worker, ready, or replace an older registration of it; returns the id of its lease.

        Raises:
            ModelMismatch: the live workers serve another model.
            Superseded: a newer registration of the same worker stands, whichever came first.
        """
        await self._check_model(info)  # before anybody has seen it
        lease = await self._store.grant(self._ttl_s)
        try:
            replaced = await self._write(StoredWorker(lease_id=lease, record=WorkerRecord(info=info, state="ready")))
            if replaced:
                await self._store.revoke(replaced)
            await self._check_model(info)  # after: of two that came at once, each sees the other, and comes again later
        except LeaseLost:
            raise StoreError("the lease lapsed before the worker was written") from None
        except (ModelMismatch, Superseded):
            await self._store.revoke(lease)
            raise
        return lease

    async def _write(self, new: StoredWorker) -> str | None:
        """Put a registration in the place of an older one; returns the lease of that."""
        info = new.record.info
        key = self._prefix + info.worker_id
        await self._store.put(self._whole_prefix + new.lease_id, to_json(new), new.lease_id)
        for _ in range(_ATTEMPTS):
            entry = await self._store.get(key)
            old = await self._read(entry) if entry else None
            if old and old.record.info.age_order > info.age_order:
                raise Superseded(
                    f"worker {info.worker_id}: registration {info.incarnation} is older than that of "
                    f"{old.record.info.incarnation}, which stands",
                    "incarnation",
                )
            if old and old.lease_id == new.lease_id:  # written, but the store's answer was lost
                return None
            expected = entry.mod_revision if entry else 0
            if await self._store.put_if(key, _encode(new), expected, new.lease_id) is not None:
                return old.lease_id if old else None
        raise StoreError(f"worker {info.worker_id} is changed by others all the time")

    async def heartbeat(self, worker_id: str, beat: HeartbeatRequest) -> WorkerRecord:
        """Renew a worker's lease and take note of its load.

        Raises:
            UnknownLease: it has lapsed, or the worker has been registered anew.
        """
        with suppress(LeaseLost):
            await self._store.keepalive(beat.lease_id)
            entry = await self._store.get(self._prefix + worker_id)
            stored = _decode(entry) if entry else None
            if stored and (stored.lease_id, stored.record.info.incarnation) == (beat.lease_id, beat.incarnation):
                self._loads.tell(worker_id, beat.lease_id, beat.load)
                return self._with_load(stored)
        raise UnknownLease(f"worker {worker_id} holds no lease {beat.lease_id}", "lease_id")

    async def drain(self, worker_id: str) -> WorkerRecord:
        """Mark a worker as draining; it is told with its next heartbeat. Raises `UnknownWorker`."""
        for _ in range(_ATTEMPTS):
            found = await self._find(worker_id)
            if found is None:
                break
            stored, entry = found
            record = stored.record.model_copy(update={"state": "draining"})
            drained = StoredWorker(lease_id=stored.lease_id, record=record)
            with suppress(LeaseLost):
                if stored.record.state == "draining" or await self._store.put_if(
                    entry.key, _encode(drained), entry.mod_revision, stored.lease_id
                ):
                    return self._with_load(drained)
        else:
            raise StoreError(f"worker {worker_id} is changed by others all the time")
        raise _unknown(worker_id)

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
        return self._with_load(found[0])

    async def workers(self, with_load: bool = True) -> WorkerList:
        """All live workers, by id."""
        entries, revision = await self._store.scan(self._prefix.removesuffix("/"))
        by_key = {entry.key: entry for entry in entries}
        records = []
        for entry in entries:
            stored = _decode(entry) if entry.key.startswith(self._prefix) else None
            if stored:
                stored = _completed(stored, by_key.get(self._whole_prefix + stored.lease_id))
                records.append(self._with_load(stored) if with_load else stored.record)
        return WorkerList(revision=revision, workers=records)

    async def changes(self, from_revision: int, confirm_interval_s: float) -> AsyncGenerator[Change | Confirmed, None]:
        """Changes from a revision on, as `Store.watch` gives them and with its errors. Load is no part of them."""
        async with aclosing(self._store.watch(self._prefix, from_revision, confirm_interval_s)) as events:
            async for event in events:
                if isinstance(event, Confirmed):
                    yield event
                    continue
                stored = None
                if event.kind == "put":
                    stored = await self._read(Entry(event.key, event.value, event.revision))
                yield Change(event.revision, event.key.removeprefix(self._prefix), stored.record if stored else None)

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
        stored = await self._read(entry) if entry else None
        return (stored, entry) if stored and entry else None

    async def _read(self, entry: Entry) -> StoredWorker | None:
        stored = _decode(entry)
        return _completed(stored, await self._store.get(self._whole_prefix + stored.lease_id)) if stored else None

    def _with_load(self, stored: StoredWorker) -> WorkerRecord:
        load = self._loads.get(stored.record.info.worker_id, stored.lease_id)
        return stored.record.model_copy(update={"load": load})


def _unknown(worker_id: str) -> UnknownWorker:
    return UnknownWorker(f"no live worker {worker_id}", "worker_id")


def _encode(stored: StoredWorker) -> bytes:
    """A worker's key as every release reads it."""
    return to_json(stored, FIRST_VERSION)


def _decode(entry: Entry) -> StoredWorker | None:
    """The worker in a key; None for what no release of ours wrote, which must not hide the others."""
    try:
        stored = StoredWorker.model_validate_json(entry.value)
    except ValidationError as error:
        log.warning("%s can't be read: %s", entry.key, error)
        return None
    # The first release's managers keep the load there.
    return stored.model_copy(update={"record": stored.record.model_copy(update={"load": None})})


def _completed(stored: StoredWorker, whole: Entry | None) -> StoredWorker:
    """`stored` with all that its registration told, where a manager that knew it wrote it."""
    told = _decode(whole) if whole else None
    if told is None:
        return stored
    return stored.model_copy(update={"record": stored.record.model_copy(update={"info": told.record.info})})
