"""The cluster manager's REST schemas and the values of its store; a field that is not here is refused."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["context", "generation"]
WorkerState = Literal["starting", "ready", "draining"]


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class KvRankEndpoint(Schema):
    instance: str
    host: str
    port: int
    layout: str


class KvEndpoint(Schema):
    worker_id: str
    instance: str
    host: str
    port: int
    layout_hash: str
    ranks: tuple[KvRankEndpoint, ...] = ()


class WorkerInfo(Schema):
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
    started_at: float = Field(description="Unix time, seconds")


class WorkerLoad(Schema):
    running: int = 0
    waiting: int = 0
    blocks_available: int = 0
    blocks_total: int = 0


class WorkerRecord(Schema):
    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad = WorkerLoad()


class RegisterRequest(Schema):
    info: WorkerInfo


class RegisterReply(Schema):
    lease_id: str
    ttl_s: float
    heartbeat_interval_s: float


class HeartbeatRequest(Schema):
    lease_id: str
    incarnation: str
    load: WorkerLoad = WorkerLoad()


class HeartbeatReply(Schema):
    state: WorkerState
    ttl_s: float


class WorkerList(Schema):
    revision: int
    workers: list[WorkerRecord]


class WatchEvent(Schema):
    type: Literal["snapshot", "put", "delete", "bookmark"]
    revision: int
    worker_id: str | None = None
    worker: WorkerRecord | None = None
    workers: list[WorkerRecord] | None = None
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


class StoredWorker(Schema):
    lease_id: str
    record: WorkerRecord
