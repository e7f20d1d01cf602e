"""The cluster: worker pools, manager, proxy, and how they find each other."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from pdserve.config.llm_args import LlmArgs, Section


class ClusterUri(NamedTuple):
    """A parsed `cluster_uri`: scheme "memory" or "etcd", and for etcd its endpoints as host:port."""

    scheme: Literal["memory", "etcd"]
    endpoints: tuple[str, ...] = ()
    user: str | None = None
    password: str | None = None

    @classmethod
    def parse(cls, uri: str) -> ClusterUri:
        """Raises ValueError naming what is allowed; what is given may hold a password, and is not repeated."""
        allowed = "allowed: memory://, etcd://[user:password@]host:port[,host:port...]"
        if uri == "memory://":
            return cls("memory")
        if not uri.startswith("etcd://"):
            raise ValueError(allowed)
        credentials, _, hosts = uri.removeprefix("etcd://").rpartition("@")
        endpoints = tuple(hosts.rstrip("/").split(","))
        for number, endpoint in enumerate(endpoints, start=1):
            if not _is_host_port(endpoint):
                raise ValueError(f"endpoint {number} is not host:port; {allowed}")
        user, _, password = credentials.partition(":")
        return cls("etcd", endpoints, user or None, password or None)

    def __repr__(self) -> str:
        return f"ClusterUri(scheme={self.scheme!r}, endpoints={self.endpoints!r}, user={self.user!r})"


def _is_host_port(endpoint: str) -> bool:
    """An IPv6 address stands in brackets."""
    try:
        parts = urlsplit(f"//{endpoint}")
        return parts.netloc == endpoint and bool(parts.hostname) and parts.port is not None and "@" not in endpoint
    except ValueError:
        return False


def _check_cluster_uri(uri: str) -> str:
    ClusterUri.parse(uri)
    return uri


Port = Annotated[int, Field(ge=0, le=65535)]


class MinimalInstances(Section):
    context_servers: int = Field(default=1, ge=0)
    generation_servers: int = Field(default=1, ge=0)


class DisaggCluster(Section):
    """Membership. A worker that has not sent a heartbeat for `inactive_timeout_sec` is gone, until it sends one again;
    so is one whose engine process has been silent for as long.

    The proxy reports ready once `minimal_instances` of each role are connected. A process that is told to stop
    gives its open requests `drain_timeout_sec` to finish.
    """

    cluster_uri: Annotated[str, AfterValidator(_check_cluster_uri)] = Field(default="memory://", repr=False)
    cluster_name: str = Field(default="pdserve", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    minimal_instances: MinimalInstances = MinimalInstances()
    heartbeat_interval_sec: float = Field(default=2.0, gt=0)
    inactive_timeout_sec: float = Field(default=10.0, gt=0)
    drain_timeout_sec: float = Field(default=30.0, ge=0)

    @model_validator(mode="after")
    def _heartbeats_fit_into_the_timeout(self) -> DisaggCluster:
        if self.inactive_timeout_sec < 2 * self.heartbeat_interval_sec:
            raise ValueError("inactive_timeout_sec must be at least twice heartbeat_interval_sec")
        return self


class ManagerConfig(Section):
    """The cluster manager's REST server. Workers and proxy reach it at `hostname`:`port`."""

    hostname: str = "localhost"
    port: Port = 8001


class ProxyConfig(Section):
    """The front. Its address is the top-level `hostname` and `port`.

    `max_concurrent_requests` open requests are served; one more is answered 429. A request counts as often as it has
    choices: `n` for each of its prompts. In the same way open requests may hold `max_total_body_bytes` of bodies, of
    which a quarter is kept for small ones, and `max_total_prompt_tokens` tokens of prompts, once for each choice.
    `request_timeout_s` bounds a request from arrival to its last token. After a failure a request is tried again,
    unless more than `max_retries` have come in a row without a new token; a worker that refuses as it drains, is full,
    or is not ready has not failed. Lost workers count apart: a request is tried again unless more than
    `max_worker_losses` were lost in a row, none of which had given it a token. Browsers may call from
    `cors_allow_origins`; "*" is any page, an empty list none.
    """

    placement: Literal["round_robin", "least_loaded"] = "least_loaded"
    max_concurrent_requests: int = Field(default=1024, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1024)
    max_total_body_bytes: int = Field(default=256 << 20, ge=2048)
    max_total_prompt_tokens: int = Field(default=8 << 20, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_retries: int = Field(default=2, ge=0)
    max_worker_losses: int = Field(default=5, ge=0)
    served_model_name: str | None = None
    cors_allow_origins: tuple[str, ...] = ("*",)

    @field_validator("max_total_body_bytes")
    @classmethod
    def _the_largest_body_fits(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes")
        if largest is not None and value < 2 * largest:
            raise ValueError(f"at least twice max_body_bytes is needed, {2 * largest}")
        return value


class ConditionalDisaggConfig(Section):
    """When a generation worker computes a prompt itself, next to its decodes, instead of having its KV sent.

    A prompt of at most `max_local_prefill_length` tokens always; a cached prefix counts in full.
    One for which the context worker that would take it has more than `max_context_queue_tokens` prompt tokens in line,
    besides four for each that a generation worker has in line itself (null: however many). With this set, also every
    prompt while there is no context worker that could take it.

    `scheduler_config.max_mixed_prefill_tokens` of the generation workers bounds what that costs those who decode.
    The proxy's health still asks for `disagg_cluster.minimal_instances` of context workers. Without context workers in
    the configuration all prompts are computed by generation workers, whatever stands here.
    """

    max_local_prefill_length: int = Field(default=0, ge=0)
    max_context_queue_tokens: int | None = Field(default=None, ge=0)


class WorkerPool(LlmArgs):
    """`num_instances` workers of one role. `port` is the first's HTTP port and counts up; 0 takes free ports."""

    num_instances: int = Field(default=1, ge=0)
    hostname: str = "localhost"
    port: Port = 0


class ClusterConfig(LlmArgs):
    """The whole YAML file. Engine keys at the top level are inherited by both pools; a pool's own key wins."""

    hostname: str = "localhost"
    port: Port = 8000
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    manager: ManagerConfig = ManagerConfig()
    proxy: ProxyConfig = ProxyConfig()
    disagg_cluster: DisaggCluster = DisaggCluster()
    context_servers: WorkerPool
    generation_servers: WorkerPool
    conditional_disagg_config: ConditionalDisaggConfig = ConditionalDisaggConfig()

    @field_validator("conditional_disagg_config")
    @classmethod
    def _generation_workers_can_take_these_prompts(
        cls, value: ConditionalDisaggConfig, info: ValidationInfo
    ) -> ConditionalDisaggConfig:
        contexts, pool = info.data.get("context_servers"), info.data.get("generation_servers")
        if contexts is None or contexts.num_instances == 0 or pool is None or pool.enable_chunked_prefill:
            return value
        if value.max_context_queue_tokens is not None:
            raise ValueError(
                "max_context_queue_tokens sends prompts of any length to generation workers, which needs "
                "generation_servers.enable_chunked_prefill; allowed without: null"
            )
        if value.max_local_prefill_length > pool.max_num_tokens:
            raise ValueError(
                "without generation_servers.enable_chunked_prefill, max_local_prefill_length is at most "
                f"generation_servers.max_num_tokens, {pool.max_num_tokens}"
            )
        return value

    @property
    def model_name(self) -> str:
        """What clients call the model: `proxy.served_model_name`, or the last part of `model`'s path."""
        return self.proxy.served_model_name or PurePath(self.model).name

    @model_validator(mode="before")
    @classmethod
    def _pools_inherit_engine_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        shared = {key: data[key] for key in LlmArgs.model_fields if key in data}
        for pool in ("context_servers", "generation_servers"):
            own = data.get(pool, {})
            if isinstance(own, dict):
                data = {**data, pool: merge(shared, own)}
        return data

    @model_validator(mode="before")
    @classmethod
    def _an_empty_pool_is_complete(cls, data: Any) -> Any:
        """`num_instances: 0` asks for no minimal instances either, unless the file says how many."""
        if not isinstance(data, dict):
            return data
        pools = {key: data.get(key) for key in MinimalInstances.model_fields}
        empty = {key: 0 for key, pool in pools.items() if isinstance(pool, dict) and pool.get("num_instances") == 0}
        minimal: dict[str, Any] = {"disagg_cluster": {"minimal_instances": empty}}
        return merge(minimal, data) if empty else data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top: mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
