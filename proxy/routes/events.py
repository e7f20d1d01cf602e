"""Server-sent events in OpenAI's form: `data:` and a JSON object."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from pdserve.errors import PdserveError

DONE = b"data: [DONE]\n\n"

HOLE: Final[Any] = "\x00"
"""Stands in an `EventTemplate` for what differs."""


def event(data: object) -> bytes:
    """`data` as one event."""
    return b"data: %b\n\n" % msgspec.json.encode(data)


def error_event(error: PdserveError) -> bytes:
    """The event for an error after the first byte; the last of its stream."""
    return event(error.to_openai())


class EventTemplate:
    """An event that is the same each time but for one value: encoded once, and filled in for each token.

    Args:
        data: the event's object, with `HOLE` for the value. Nothing that stands behind it may be `HOLE`, too.
    """

    __slots__ = ("_after", "_before")

    def __init__(self, data: object) -> None:
        self._before, _, self._after = event(data).rpartition(msgspec.json.encode(HOLE))

    def fill(self, value: object) -> bytes:
        """The event with `value`."""
        return b"".join((self._before, msgspec.json.encode(value), self._after))
