"""Hosts and ports: how they are written, and which can be dialled."""

from __future__ import annotations

import socket

import pytest

from pdserve.addresses import dial_host, host_of_url, host_port, http_url, is_every_address, is_loopback
from pdserve.http import bind

EVERY = ["", "*", "0", "0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0", "::ffff:0.0.0.0", "::%lo"]


@pytest.mark.parametrize(
    ("host", "written"), [("h", "h:1"), ("10.0.0.1", "10.0.0.1:1"), ("::1", "[::1]:1"), ("[::1]", "[::1]:1")]
)
def test_an_ipv6_address_goes_in_brackets(host: str, written: str) -> None:
    assert host_port(host, 1) == written
    assert http_url(host, 1) == f"http://{written}"
    assert host_of_url(http_url(host, 1)) == host.strip("[]")


@pytest.mark.parametrize("host", EVERY)
def test_an_address_to_listen_at_is_never_given_out(host: str) -> None:
    assert is_every_address(host)
    assert not is_loopback(host)
    assert host_of_url(http_url(host, 80)) in ("127.0.0.1", "::1")
    given = dial_host(host, "192.0.2.9", 80)
    assert not is_every_address(given)
    assert socket.getaddrinfo(given, 80)


@pytest.mark.parametrize("host", ["h", "localhost", "0.0.0.1", "::1", "10.0.0.0", "zero", "0.example"])
def test_other_addresses_are_themselves(host: str) -> None:
    assert not is_every_address(host)
    assert dial_host(host, "192.0.2.9", 80) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost"])
def test_what_is_bound_is_reached_by_its_url(host: str) -> None:
    with bind(host, 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((host_of_url(http_url(host, port)), port), timeout=5):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_what_listens_everywhere_is_reached_by_the_url_that_its_host_goes_by(host: str) -> None:
    with bind(host, 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((host_of_url(http_url(host, port)), port), timeout=5):
            pass
