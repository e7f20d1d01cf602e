"""The transceiver's control messages and their frames. Payload travels beside them, matched by tag.

A frame is one byte of wire version and one msgpack message. On a connection, which the sender opens::

    sender                                   receiver
    Hello  (who, whom, layout)        →
                                      ←      HelloReply (or why not)
    Offer                             →      ImportOffered to its engine, accepted whenever there are blocks
    Ready  (blocks that may be sent)  →
                                      ←      Grant (a receive is posted under `tag` for these blocks)
    payload under `tag`, Data         →
    Complete (first token)            →
                                      ←      Done (everything is in its blocks)

Ready, Grant and Data repeat. Abort ends a handoff from either side. **Every Grant is redeemed**: a sender that has
nothing left to send for it sends one byte under its tag and a Data of 0 bytes, so that the receiver's slot comes back.
A handoff is known by the number that its sender gave it, unique on its connection: a frame that is late for one
attempt can't be taken for another's.
"""

from __future__ import annotations

import msgspec

from kv_transfer.layout import KvLayout
from pdserve.errors import ErrorInfo, TransferError
from pdserve.protocol import Key

WIRE_VERSION = 1


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """`instance` is the receiver's, as its address told it. A message holds at most `max_message_blocks` blocks."""

    worker_id: str
    instance: str
    layout: KvLayout
    max_message_blocks: int


class HelloReply(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """With `error`, the receiver wants nothing from this sender and closes the connection."""

    worker_id: str
    error: ErrorInfo | None = None


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    handoff: int
    key: Key
    num_tokens: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The first `num_blocks` blocks of the sequence may be granted."""

    handoff: int
    num_blocks: int


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Send blocks `first_block` to `first_block + num_blocks` under `tag`, which is never used again."""

    handoff: int
    tag: int
    first_block: int
    num_blocks: int


class Data(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """What was sent under `tag`: `nbytes` is 0 for a grant that is given back. `crc32` is of the payload.

    It follows the payload, once that has left the sender's slot. A GPU receiver reads the slot by itself: one that was
    frozen until the sender gave it up could read what the slot holds by then. Without Data it uses nothing of it.
    """

    handoff: int
    tag: int
    nbytes: int
    crc32: int | None = None


class Complete(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Every block is ready; `first_token` was sampled from the last position."""

    handoff: int
    first_token: int


class Done(msgspec.Struct, frozen=True, array_like=True, tag=8):
    handoff: int


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The handoff is over, from either side. `reason` is one of `pdserve.errors.TRANSFER_REASONS`."""

    handoff: int
    reason: str
    message: str


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Sent while payload is under way; a peer that answers nothing is frozen or gone."""


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=11):
    pass


FromSender = Hello | Offer | Ready | Data | Complete
FromReceiver = HelloReply | Grant | Done
Message = FromSender | FromReceiver | Abort | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """`message` as a frame."""
    return bytes((WIRE_VERSION,)) + _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """The message in `frame`.

    Raises:
        TransferError: "protocol", for another wire version or something that is no message.
    """
    if not frame or frame[0] != WIRE_VERSION:
        theirs = frame[0] if frame else None
        raise TransferError(f"the peer speaks wire version {theirs}, we speak {WIRE_VERSION}", "protocol", "version")
    try:
        return _decoder.decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TransferError(f"the peer sent a malformed message: {error}", "protocol") from None
