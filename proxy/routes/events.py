"""Server-sent events in OpenAI's form: the frame around each chunk, built once for an answer."""

from __future__ import annotations

import msgspec

from pdserve.errors import PdserveError
from proxy.schemas.usage import UsageInfo

DONE = b"data: [DONE]\n\n"


class EventFrame:
    """The part that all chunks of one answer share.

    Args:
        kind: the `object` of a chunk.
        with_usage: whether a last chunk will carry token counts; the others then say `"usage": null`.
    """

    def __init__(self, answer_id: str, kind: str, created: int, model: str, with_usage: bool) -> None:
        head = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def choice(self, choice: object) -> bytes:
        """The event for one choice's news."""
        return self._head + msgspec.json.encode(choice) + self._tail

    def text(self, before: bytes, text: str, after: bytes) -> bytes:
        """The event for one choice that has `text` between two parts of its JSON, which are always the same."""
        return b"".join((self._head, before, msgspec.json.encode(text), after, self._tail))

    def usage(self, usage: UsageInfo) -> bytes:
        """The event with the token counts."""
        return self._head + b'],"usage":' + msgspec.json.encode(usage) + b"}\n\n"


def error_event(error: PdserveError) -> bytes:
    """The event for an error after the first byte; the last of its stream."""
    return b"data: " + msgspec.json.encode(error.to_openai()) + b"\n\n"
