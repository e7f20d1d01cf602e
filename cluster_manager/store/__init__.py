"""Where the manager keeps the cluster: in its own memory, or in etcd."""

from cluster_manager.store.base import Compacted, Confirmed, Entry, Event, Lease, LeaseLost, Store, StoreError
from cluster_manager.store.memory import MemoryStore
from pdserve.config import ClusterUri
from pdserve.errors import ConfigError

__all__ = [
    "Compacted",
    "Confirmed",
    "Entry",
    "Event",
    "Lease",
    "LeaseLost",
    "MemoryStore",
    "Store",
    "StoreError",
    "open_store",
]


def open_store(uri: str) -> Store:
    """The store that `cluster_uri` names; connects when first used.

    Raises:
        ConfigError: the URI names etcd, and its client is not installed.
    """
    parsed = ClusterUri.parse(uri)
    if parsed.scheme == "memory":
        return MemoryStore()
    try:
        from cluster_manager.store.etcd import EtcdStore
    except ImportError as error:
        key = "disagg_cluster.cluster_uri"
        raise ConfigError(f"{key}: etcd needs the extra 'etcd' (pip install 'pdserve[etcd]'): {error}", key) from None
    return EtcdStore(parsed.endpoints, parsed.user, parsed.password)
