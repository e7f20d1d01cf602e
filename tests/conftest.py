"""Fixtures for all tests."""

from tests.etcd_server import etcd_server, own_etcd_server

__all__ = ["etcd_server", "own_etcd_server"]
