"""Host names and addresses: how they are written, which ones mean this host, and where others reach it.

A host that a process listens at may mean every address of its machine. Nobody can connect to that: what it tells others
is `dial_host`.
"""

from __future__ import annotations

import ipaddress
import socket

_ANYWHERE = ("192.0.2.1", 9)
"""An address that belongs to nobody (RFC 5737): the way there is the default route."""


def bare(host: str) -> str:
    """`host` without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def host_port(host: str, port: int) -> str:
    """As in a URL: an IPv6 address goes in brackets."""
    return f"[{bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def http_url(host: str, port: int) -> str:
    return f"http://{host_port(host, port)}"


def is_every_address(host: str) -> bool:
    """Whether listening at `host` is listening at every address of this machine."""
    return bare(host) in ("", "0.0.0.0", "::", "*")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can't be reached from another machine. May ask the resolver."""
    if is_every_address(host):
        return False
    try:
        found = socket.getaddrinfo(bare(host), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(_is_loopback(str(address[0])) for *_, address in found)


def is_this_machine(host: str) -> bool:
    """Whether `host`, a name or an address, is one of this machine's. May ask the resolver."""
    try:
        found = socket.getaddrinfo(bare(host), 0, type=socket.SOCK_DGRAM)
        for family, kind, proto, _, address in found:
            with socket.socket(family, kind, proto) as probe:
                probe.bind(address)
    except OSError:
        return False
    return True


def dial_host(host: str, towards: str, port: int) -> str:
    """Where others reach what listens at `host`: there, or if that means every address, at the one that this machine
    has on its way to `towards`:`port`, a process that the others know. Nothing is sent.

    Only where that process is on this very machine, which says nothing, is it the address of the default route, and
    where there is none, that of loopback.
    """
    if not is_every_address(host):
        return bare(host)
    for peer in ((bare(towards), port), _ANYWHERE):
        own = _own_address(*peer)
        if own is not None and not _is_loopback(own):
            return own
    return "127.0.0.1"


def _own_address(host: str, port: int) -> str | None:
    """This machine's address on the way there."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
