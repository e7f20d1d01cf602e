"""Hosts as users write them, and as others are told them."""

from __future__ import annotations

import socket

import pytest

from pdserve import addresses
from pdserve.addresses import bare, dial_host, host_port, http_url, is_every_address, is_loopback, is_this_machine
from pdserve.worker.server import worker_id


def test_an_ipv6_address_goes_in_brackets_where_a_port_follows() -> None:
    assert http_url("localhost", 80) == "http://localhost:80"
    assert http_url("10.0.0.7", 80) == "http://10.0.0.7:80"
    assert http_url("::1", 80) == http_url("[::1]", 80) == "http://[::1]:80"
    assert host_port("fe80::1", 9) == "[fe80::1]:9"
    assert bare("[fd00::2]") == bare("fd00::2") == "fd00::2"


@pytest.mark.parametrize(
    ("host", "every", "loopback"),
    [
        ("", True, False),
        ("0.0.0.0", True, False),
        ("::", True, False),
        ("[::]", True, False),
        ("localhost", False, True),
        ("127.0.0.1", False, True),
        ("127.8.8.8", False, True),
        ("::1", False, True),
        ("[::1]", False, True),
        ("10.0.0.7", False, False),
        ("fd00::2", False, False),
        ("no-such-host.invalid", False, False),
    ],
)
def test_what_a_host_means(host: str, every: bool, loopback: bool) -> None:
    assert is_every_address(host) is every
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("127.0.0.1", True), ("192.0.2.254", False), ("no-such-host.invalid", False)],
)
def test_which_hosts_are_this_machine(host: str, here: bool) -> None:
    assert is_this_machine(host) is here


@pytest.mark.parametrize("host", ["localhost", "node-7.example", "10.0.0.7", "::1", "[::1]"])
def test_whoever_listens_at_one_address_is_reached_there(host: str) -> None:
    assert dial_host(host, "manager.invalid", 1) == bare(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_whoever_listens_at_every_address_is_reached_on_the_way_to_the_manager(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = {"manager": "10.1.2.3", "here": "127.0.0.1", addresses._ANYWHERE[0]: "10.9.9.9"}
    monkeypatch.setattr(addresses, "_own_address", lambda towards, port: ways.get(towards))
    assert dial_host(host, "manager", 1) == "10.1.2.3"
    assert dial_host(host, "here", 1) == "10.9.9.9", "a manager on this machine does not say how others get here"
    assert dial_host(host, "[here]", 1) == "10.9.9.9"
    ways.pop(addresses._ANYWHERE[0])
    assert dial_host(host, "here", 1) == "127.0.0.1", "there is no network"


def test_the_way_somewhere_is_asked_of_the_kernel() -> None:
    assert addresses._own_address("127.0.0.1", 1) == "127.0.0.1"
    assert addresses._own_address("no-such-host.invalid", 1) is None


def test_a_worker_of_another_host_carries_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "node-7.example")
    assert worker_id("context", 0, "localhost") == "context-0"
    assert worker_id("context", 1, "0.0.0.0") == worker_id("context", 1, "::") == "context-1.node-7.example"
    assert worker_id("generation", 0, "[fe80::1%eth0]") == "generation-0.fe80__1_eth0"
