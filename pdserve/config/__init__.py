"""Every YAML key and command-line flag, as frozen pydantic models.

`load` merges YAML files, the environment and command-line flags into a `ClusterConfig`; the rest of the system
receives the part that concerns it and never reads a file or the environment itself.
"""

from pdserve.config.cluster import (
    ClusterConfig,
    ClusterUri,
    ConditionalDisaggConfig,
    DisaggCluster,
    ManagerConfig,
    MinimalInstances,
    ProxyConfig,
    WorkerPool,
)
from pdserve.config.environment import is_setting
from pdserve.config.llm_args import CacheTransceiverConfig, CudaGraphConfig, KvCacheConfig, LlmArgs, SchedulerConfig
from pdserve.config.load import load, validated
from pdserve.config.masking import mask_text, masked

__all__ = [
    "CacheTransceiverConfig",
    "ClusterConfig",
    "ClusterUri",
    "ConditionalDisaggConfig",
    "CudaGraphConfig",
    "DisaggCluster",
    "KvCacheConfig",
    "LlmArgs",
    "ManagerConfig",
    "MinimalInstances",
    "ProxyConfig",
    "SchedulerConfig",
    "WorkerPool",
    "is_setting",
    "load",
    "mask_text",
    "masked",
    "validated",
]
