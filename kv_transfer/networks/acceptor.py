"""Listening sockets in an event loop, which outlive a want of descriptors.

A loop's own server floods the log when `accept` fails for that reason, or hangs up on whoever waits and tells nobody.
Here connections wait in the kernel's queue until there are descriptors again.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kv_transfer.networks.descriptors import OUT_OF_RESOURCES, Descriptors
from pdserve.addresses import bare, host_port, is_every_address

BACKLOG = 128
ACCEPTS_A_TURN = 16
PORT_ATTEMPTS = 16


class Acceptor:
    """Hands each connection to one of `listeners` (bound, and owned from now on) to `on_socket`, until `close`."""

    def __init__(
        self, listeners: list[socket.socket], on_socket: Callable[[socket.socket], None], descriptors: Descriptors
    ) -> None:
        self._listeners = listeners
        self._on_socket = on_socket
        self._descriptors = descriptors
        self._loop = asyncio.get_running_loop()
        for listener in listeners:
            listener.setblocking(False)
            listener.listen(BACKLOG)
            self._loop.add_reader(listener, self._accept, listener)

    def close(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                accepted, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in OUT_OF_RESOURCES:
                    raise
                self._loop.remove_reader(listener)
                self._descriptors.ran_out(error)
                self._descriptors.when_there_are_some(lambda: self._resume(listener))
                return
            accepted.setblocking(False)
            self._on_socket(accepted)

    def _resume(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)


async def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that `host` means, all with one port; empty, "0.0.0.0" and "::" mean every address.

    Raises:
        OSError: an address is taken, or none of them is this host's.
    """
    host = bare(host)
    if is_every_address(host):
        both = host != "0.0.0.0" and socket.has_dualstack_ipv6()
        return [_bind(socket.AF_INET6, ("::", port)) if both else _bind(socket.AF_INET, ("0.0.0.0", port))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for attempts_left in reversed(range(PORT_ATTEMPTS)):
        try:
            return _bind_all(addresses, port)
        except OSError as error:
            # A port that is free at one address may be taken at the next.
            if error.errno != errno.EADDRINUSE or port or not attempts_left:
                raise
    raise AssertionError("the last attempt returns or raises")


def _bind_all(addresses: Sequence[tuple[int, tuple[Any, ...]]], port: int) -> list[socket.socket]:
    bound: list[socket.socket] = []
    missing: OSError | None = None
    for family, address in addresses:
        port = bound[0].getsockname()[1] if bound else port
        try:
            bound.append(_bind(family, (address[0], port, *address[2:])))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                missing = error  # a name may have addresses that this host lacks
                continue
            for each in bound:
                each.close()
            raise
    if missing is not None and not bound:
        raise missing
    return bound


def bind_locally(name: str) -> list[socket.socket]:
    """A Unix socket of that name in Linux's abstract namespace; none where there is no such thing, or not for us."""
    if not sys.platform.startswith("linux"):
        return []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
    except OSError:
        listener.close()
        return []
    return [listener]


def _bind(family: int, address: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        listener.bind(address)
    except OSError as error:
        listener.close()
        at = host_port(address[0], address[1])
        raise OSError(error.errno, f"can't listen at {at}: {error.strerror}") from None
    return listener
