"""Asks UCX which transports an endpoint uses: `ucp_ep_query`, which ucxx does not wrap.

The structures are those of UCX's `ucp/api/ucp.h`; their layout is kept compatible by `field_mask` and `entry_size`.
"""

from __future__ import annotations

import ctypes

_FIELD_TRANSPORTS = 1 << 3
_NAME_BYTES = 32
_SOCKADDR_STORAGE_BYTES = 128
_MAX_ENTRIES = 16


class _Entry(ctypes.Structure):
    _fields_ = [("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p)]


class _Transports(ctypes.Structure):
    _fields_ = [
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    ]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * _NAME_BYTES),
        ("local_sockaddr", ctypes.c_uint64 * (_SOCKADDR_STORAGE_BYTES // 8)),
        ("remote_sockaddr", ctypes.c_uint64 * (_SOCKADDR_STORAGE_BYTES // 8)),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    ]


def endpoint_transports(endpoint_handle: int) -> str:
    """Names of the transports in use, sorted and joined by commas; empty when UCX doesn't say.

    `endpoint_handle` is a `ucp_ep_h` that is open.
    """
    try:
        query = ctypes.CDLL("libucp.so.0").ucp_ep_query
    except (OSError, AttributeError):
        return ""
    query.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Attributes)]
    query.restype = ctypes.c_int8
    entries = (_Entry * _MAX_ENTRIES)()
    attributes = _Attributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports.entries = ctypes.cast(entries, ctypes.POINTER(_Entry))
    attributes.transports.num_entries = _MAX_ENTRIES
    attributes.transports.entry_size = ctypes.sizeof(_Entry)
    if query(endpoint_handle, ctypes.byref(attributes)) != 0:
        return ""
    found = entries[: attributes.transports.num_entries]
    return ",".join(sorted({entry.transport_name.decode() for entry in found if entry.transport_name}))
