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
        allowed = "allowed: memory://, etcd://host:2379[,host:2379...], with user and password as in other URLs"
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
    """Connected workers of each role with which the proxy is ready; 0 by default of a pool without instances."""

    context_servers: int = Field(default=1, ge=0, description="context workers")
    generation_servers: int = Field(default=1, ge=0, description="generation workers")


class DisaggCluster(Section):
    """Membership: who is alive, and for how long those wait who end."""

    cluster_uri: Annotated[str, AfterValidator(_check_cluster_uri)] = Field(
        default="memory://",
        repr=False,
        description="the manager's store: memory:// or etcd://[user:password@]host:port,...",
    )
    cluster_name: str = Field(
        default="pdserve", min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="tells clusters of one etcd apart"
    )
    minimal_instances: MinimalInstances = MinimalInstances()
    heartbeat_interval_sec: float = Field(default=2.0, gt=0, description="between two heartbeats of a worker")
    inactive_timeout_sec: float = Field(
        default=10.0,
        gt=0,
        description="without a heartbeat for so long a worker is gone until it sends one, and so is one whose engine "
        "process has been silent for as long; at least twice heartbeat_interval_sec",
    )
    drain_timeout_sec: float = Field(
        default=30.0, ge=0, description="what a process that is told to stop gives its open requests to finish"
    )

    @model_validator(mode="after")
    def _heartbeats_fit_into_the_timeout(self) -> DisaggCluster:
        if self.inactive_timeout_sec < 2 * self.heartbeat_interval_sec:
            raise ValueError("inactive_timeout_sec must be at least twice heartbeat_interval_sec")
        return self


class ManagerConfig(Section):
    """The cluster manager's REST server, where workers and proxy reach it."""

    hostname: str = Field(default="localhost", description="address to listen at")
    port: Port = Field(default=8001, description="port of the manager")


class ProxyConfig(Section):
    """The front. Its address is the top-level `hostname` and `port`. A request counts as often as it has choices."""

    placement: Literal["round_robin", "least_loaded"] = Field(
        default="least_loaded", description="which of the workers that can take a request gets it"
    )
    max_concurrent_requests: int = Field(
        default=1024, ge=1, description="open requests, counted once for each choice of each prompt; one more gets 429"
    )
    max_body_bytes: int = Field(default=8 << 20, ge=1024, description="bytes of one request's body")
    max_total_body_bytes: int = Field(
        default=256 << 20,
        ge=2048,
        description="bytes of the bodies of all open requests, a quarter of them for small ones; at least twice "
        "max_body_bytes",
    )
    max_total_prompt_tokens: int = Field(
        default=8 << 20, ge=1, description="prompt tokens of all open requests, counted once for each choice"
    )
    request_timeout_s: float = Field(
        default=600.0, gt=0, description="seconds from a request's arrival to its last token"
    )
    max_retries: int = Field(
        default=2,
        ge=0,
        description="failures in a row, without a new token, after which a request is tried again; a worker that "
        "drains, is full or is not ready has not failed",
    )
    max_worker_losses: int = Field(
        default=5,
        ge=0,
        description="the same of workers that were lost before they gave the request a token, counted apart",
    )
    served_model_name: str | None = Field(
        default=None, description="what clients call the model; null: the last part of model's path"
    )
    tool_parser: Literal["auto", "deepseek_v3", "hermes", "llama3_json", "mistral"] | None = Field(
        default=None,
        description="how the model writes tool calls; auto: as its chat template does; null: no tools are taken",
    )
    reasoning_parser: Literal["deepseek_r1", "qwen3"] | None = Field(
        default=None, description="how the model marks its reasoning; null: reasoning is part of the content"
    )
    cors_allow_origins: tuple[str, ...] = Field(
        default=("*",), description="pages that browsers may call from; *: any; empty: none"
    )

    @field_validator("max_total_body_bytes")
    @classmethod
    def _the_largest_body_fits(cls, value: int, info: ValidationInfo) -> int:
        largest = info.data.get("max_body_bytes")
        if largest is not None and value < 2 * largest:
            raise ValueError(f"at least twice max_body_bytes is needed, {2 * largest}")
        return value


class ConditionalDisaggConfig(Section):
    """When a generation worker computes a prompt itself, next to its decodes, instead of having its KV sent.

    `scheduler_config.max_mixed_prefill_tokens` of the generation workers bounds what that costs those who decode.
    The proxy's health still asks for `disagg_cluster.minimal_instances` of context workers. Without context workers in
    the configuration all prompts are computed by generation workers, whatever stands here.
    """

    max_local_prefill_length: int = Field(
        default=0, ge=0, description="a prompt of at most so many tokens, a cached prefix included, is computed there"
    )
    max_context_queue_tokens: int | None = Field(
        default=None,
        ge=0,
        description="so is any prompt for which the context worker has more prompt tokens in line, besides four for "
        "each that a generation worker has in line itself, or for which no context worker is there; null: never",
    )


class WorkerPool(LlmArgs):
    """Workers of one role. What is not given of an engine's keys is as at the top level."""

    num_instances: int = Field(default=1, ge=0, description="workers of this role")
    hostname: str = Field(default="localhost", description="address that they listen at")
    port: Port = Field(default=0, description="HTTP port of the first, from which the others count up; 0: free ports")


class ClusterConfig(LlmArgs):
    """The whole YAML file. Engine keys at the top level are inherited by both pools; a pool's own key wins."""

    hostname: str = Field(default="localhost", description="address that the proxy listens at")
    port: Port = Field(default=8000, description="port of the proxy")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    manager: ManagerConfig = ManagerConfig()
    proxy: ProxyConfig = ProxyConfig()
    context_servers: WorkerPool
    generation_servers: WorkerPool
    disagg_cluster: DisaggCluster = Field(default=DisaggCluster(), validate_default=True)
    conditional_disagg_config: ConditionalDisaggConfig = ConditionalDisaggConfig()

    @field_validator("disagg_cluster")
    @classmethod
    def _an_empty_pool_is_complete(cls, value: DisaggCluster, info: ValidationInfo) -> DisaggCluster:
        """`num_instances: 0` asks for no minimal instances either, unless it is said how many."""
        minimal = value.minimal_instances
        pools = {name: info.data.get(name) for name in MinimalInstances.model_fields.keys() - minimal.model_fields_set}
        empty = {name: 0 for name, pool in pools.items() if pool is not None and pool.num_instances == 0}
        return value.model_copy(update={"minimal_instances": minimal.model_copy(update=empty)}) if empty else value

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


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top: mappings merge, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
