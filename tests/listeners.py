"""At which addresses a process listens."""

from __future__ import annotations

import ipaddress

import psutil


def listening_addresses(pid: int) -> set[str]:
    """Of TCP sockets, as "127.0.0.1:80"."""
    found = psutil.Process(pid).net_connections("tcp")
    return {f"{each.laddr.ip}:{each.laddr.port}" for each in found if each.status == psutil.CONN_LISTEN}


def outer(addresses: set[str]) -> set[str]:
    """Those that another machine could reach."""
    return {each for each in addresses if not ipaddress.ip_address(each.rpartition(":")[0]).is_loopback}
