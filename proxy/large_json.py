"""JSON bodies of any size without holding the interpreter for long: large ones are decoded in pieces.

msgspec holds the GIL for a whole call: 120 ms for 8 MB of short messages, 68 ms for as many token ids. A thread that
decodes 64 KiB at a time lets the event loop run in between.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

PIECE_BYTES = 64 * 1024
_LARGEST_PIECE_BYTES = 8 * PIECE_BYTES
_TRIES = 8
"""Commas that are looked at as the end of a piece before a longer one is tried."""

_FIRST = re.compile(rb"\s*(\S)")
_SEPARATORS = {b"{": b"},", b"[": b"],", b'"': b'",'}


def decode(raw: bytes) -> Any:
    """What `msgspec.json.decode(raw)` returns, or raises (`msgspec.DecodeError`, `RecursionError`)."""
    if len(raw) <= PIECE_BYTES:
        return msgspec.json.decode(raw)
    kind = _first(raw, 0)
    if kind == b"{":
        fields = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        return {name: decode(bytes(value)) for name, value in fields.items()}
    if kind == b"[":
        return _decode_list(raw.strip())
    return msgspec.json.decode(raw)


def _decode_list(raw: bytes) -> list[Any]:
    """A list, piece by piece; `raw` starts with its bracket."""
    items: list[Any] = []
    start, size = 1, PIECE_BYTES
    separator = _SEPARATORS.get(_first(raw, 1), b",")
    while start + size < len(raw):
        found = _decode_piece(raw, start, start + size, separator)
        if found is not None:
            piece, start = found
            items += piece
            size = PIECE_BYTES
        elif size < _LARGEST_PIECE_BYTES:
            size *= 2
        else:
            rest = msgspec.json.decode(b"[" + raw[start:], type=list[msgspec.Raw])
            items += [decode(bytes(item)) for item in rest]
            return items
    rest = msgspec.json.decode(b"[" + raw[start:], type=list[Any])
    if not rest and items:
        raise msgspec.DecodeError("JSON is malformed: trailing comma in array")
    return items + rest


def _decode_piece(raw: bytes, start: int, near: int, separator: bytes) -> tuple[list[Any], int] | None:
    """The items from `start` up to a comma at or after `near`, and where the next one starts.

    A comma inside a string or an inner list leaves that one unended, and so is no JSON.
    """
    for _ in range(_TRIES):
        at = raw.find(separator, near)
        if at < 0 or at - start > _LARGEST_PIECE_BYTES:
            return None
        end = at + len(separator) - 1
        try:
            items = msgspec.json.decode(b"[" + raw[start:end] + b"]", type=list[Any])
        except msgspec.DecodeError:
            near = at + 1
            continue
        return (items, end + 1) if items else None
    return None


def _first(raw: bytes, start: int) -> bytes:
    found = _FIRST.match(raw, start)
    return found[1] if found else b""
