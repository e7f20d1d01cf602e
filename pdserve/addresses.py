"""Host names and addresses: how they are written, which ones mean this host, and where others reach it.

A host that a process listens at may mean every address of its machine. Nobody can connect to that: what it tells others
is `dial_host`, and processes of the same machine go by `http_url`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

MAX_URL_CHARACTERS = 300

_ANYWHERE = ("192.0.2.1", 9)
"""An address that belongs to nobody (RFC 5737): the way there is the default route."""

_UNFIT_FOR_URL = re.compile(r"[^\x21-\x7e]|\\")


def bare(host: str) -> str:
    """`host` without the brackets that an IPv6 address has in a URL."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def host_port(host: str, port: int) -> str:
    """As in a URL: an IPv6 address goes in brackets."""
    return f"[{bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def http_url(host: str, port: int) -> str:
    """The URL of a server by the host that is configured for it. One that listens at every address is on this machine
    as far as anybody can tell, and is reached by loopback."""
    if is_every_address(host):
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://{host_port(host, port)}"


def is_every_address(host: str) -> bool:
    """Whether listening at `host` is listening at every address of this machine."""
    try:
        address = ipaddress.ip_address(bare(host).partition("%")[0])
    except ValueError:
        return host in ("", "*", "0")
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_unspecified


def host_of_url(url: str) -> str:
    """The host in a server's URL: `http://host:port`, or https.

    Raises:
        ValueError: it is no such URL, or one that nobody can connect to; the text says why and repeats nothing of it.
    """
    if len(url) > MAX_URL_CHARACTERS:
        raise ValueError(f"longer than {MAX_URL_CHARACTERS} characters")
    if _UNFIT_FOR_URL.search(url):
        raise ValueError("has characters that no URL has")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("is not http://host:port") from None
    if parts.scheme not in ("http", "https") or not host or not port:
        raise ValueError("is not http://host:port")
    if "@" in parts.netloc:
        raise ValueError("must not name a user")
    if url.removesuffix("/") != f"{parts.scheme}://{parts.netloc}":
        raise ValueError("must end with the port")
    if is_every_address(host):
        raise ValueError("names an address to listen at, which nobody can connect to")
    return host


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can't be reached from another machine. May ask the resolver."""
    if is_every_address(host):
        return False
    try:
        found = socket.getaddrinfo(bare(host), None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return all(is_loopback_address(str(address[0])) for *_, address in found)


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
        if own is not None and not is_loopback_address(own):
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


def is_loopback_address(address: str) -> bool:
    """Whether `address`, which is no name, is one of the loopback interface's."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
