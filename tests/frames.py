"""Frames that are messages of no protocol, each for a reason of its own."""

from __future__ import annotations

_HEAD = b"\x83\xa4type\xa5abort\xa3key\x92\xa1r\x00"
"""A message that withdraws a request, but for its last field, which nobody knows."""

_FRAMES = {
    "garbage": b"\xc1garbage",
    "empty": b"",
    "deep": _HEAD + b"\xa1x" + b"\x91" * 100_000 + b"\xc0",
    "invalid utf-8": b"\x82\xa4type\xa5abort\xa3key\x92\xa2\xff\xfe\x00",
    "endless": b"\x82\xa4type\xa8generate\xa9token_ids\xdd\xff\xff\xff\xff",
    "cut": _HEAD[:-3],
    "unknown": b"\x81\xa4type\xa7unheard",
    "no map": b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",
}
NO_MESSAGES, NO_MESSAGE_IDS = list(_FRAMES.values()), list(_FRAMES)
MALFORMED = [frame for name, frame in _FRAMES.items() if name != "unknown"]
"""Those that are none either where messages of a later release's kinds are left alone."""
