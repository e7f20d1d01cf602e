"""The cluster manager's REST schemas: what workers register, and what `ps` and the proxy read.

Peers of different versions read each other's messages, so fields are only ever added, each with a default. A field that
the reader does not know is kept and passed on; how messages look to processes of the first release, which refuse such
fields, is `cluster_versions`' matter.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, OnErrorOmit

from pdserve.protocol import KvAddress, KvRank, Role, WorkerState

BOOKMARK_INTERVAL_S = 2.0
"""A watch stream is not silent for longer while the store answers; a reader that hears nothing for three intervals
reconnects."""


class Schema(BaseModel):
    """A message of a peer, whose version may be newer."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())


class KvRankEndpoint(Schema):
    """`protocol.KvRank` in REST's clothes."""

    instance: str
    host: str
    port: int
    layout: str


class KvEndpoint(Schema):
    """`protocol.KvAddress` in REST's clothes."""

    worker_id: str
    instance: str
    host: str
    port: int
    layout_hash: str
    ranks: tuple[KvRankEndpoint, ...] = ()

    @classmethod
    def of(cls, address: KvAddress) -> KvEndpoint:
        ranks = [msgspec.structs.asdict(rank) for rank in address.ranks]
        return cls.model_validate(msgspec.structs.asdict(address) | {"ranks": ranks})

    def address(self) -> KvAddress:
        ranks = tuple(KvRank(rank.instance, rank.host, rank.port, rank.layout) for rank in self.ranks)
        return KvAddress(self.worker_id, self.instance, self.host, self.port, self.layout_hash, ranks)


class WorkerInfo(Schema):
    """What a worker says of itself when it registers. `incarnation` is new with every registration.

    `model_fingerprint` is the same for all workers of a cluster (`pdserve.model_fingerprint`); "" tells nothing.

    Of two registrations of one `worker_id` the one of the process that started later is newer, and of one process's the
    one with the greater `sequence`.
    """

    worker_id: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    incarnation: str = Field(min_length=1)
    role: Role
    url: str
    model: str
    max_seq_len: int
    tokens_per_block: int
    kv: KvEndpoint | None = None
    pid: int = 0
    device: str = ""
    dtype: str = ""
    model_fingerprint: str = ""
    started_at: float = Field(description="Unix time, seconds")
    sequence: int = Field(default=0, description="counts the registrations of one process")

    @property
    def age_order(self) -> tuple[float, int]:
        """Greater for the newer of two registrations; equal where neither is known to be newer."""
        return self.started_at, self.sequence


class WorkerLoad(Schema):
    """Load as the last heartbeat told it; for people, not for placement."""

    running: int = 0
    waiting: int = 0
    blocks_available: int = 0
    blocks_total: int = 0


class WorkerRecord(Schema):
    """A live worker. `load` is what its last heartbeat to this manager told; None if another manager hears them."""

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad | None = None


class RegisterRequest(Schema):
    info: WorkerInfo


class RegisterReply(Schema):
    lease_id: str
    ttl_s: float
    heartbeat_interval_s: float


class HeartbeatRequest(Schema):
    """404 `unknown_lease` in answer means: register again, with a new incarnation."""

    lease_id: str
    incarnation: str
    load: WorkerLoad = WorkerLoad()


class HeartbeatReply(Schema):
    """`state` "draining" asks the worker to take no new requests, finish and leave."""

    state: WorkerState
    ttl_s: float


class WorkerList(Schema):
    """Records that this version can't read (a role that it does not know) are left out."""

    revision: int
    workers: list[OnErrorOmit[WorkerRecord]]


class WatchEvent(Schema):
    """A line of `GET /v1/watch` (newline-delimited JSON).

    "snapshot" comes first, with all `workers`; "put" and "delete" follow in order of `revision`; "bookmark" comes
    when nothing happened for a while and the store has confirmed it, so that a reader can tell silence from a
    connection that is dead, here or between manager and store. Changes of load are no events. A stream resumed
    with `from_revision` starts with a bookmark instead of a snapshot. A snapshot may come again at any time, and
    replaces everything. Snapshots and bookmarks carry the store's `epoch`: revisions of two epochs have nothing to do
    with each other, so a reader names the epoch when it resumes.
    """

    type: Literal["snapshot", "put", "delete", "bookmark"]
    revision: int
    worker_id: str | None = None
    worker: WorkerRecord | None = None
    workers: list[OnErrorOmit[WorkerRecord]] | None = None
    epoch: str | None = None


class RoleCount(Schema):
    ready: int
    draining: int
    required: int


class ClusterStatus(Schema):
    cluster_name: str
    store: str
    ready: bool
    context_servers: RoleCount
    generation_servers: RoleCount
