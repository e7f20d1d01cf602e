"""The transceiver's control messages and their frames. Payload travels beside them, matched by tag.

A frame is one byte of wire version and one msgpack message; with checksums on, the message's CRC-32 stands between the
two, and the version's highest bit is set. A connection joins one rank of a context worker with one
rank of a generation worker whose pool shares layers and heads with its own; what they share is fixed by OpenLink. The
sender opens it::

    sender                                   receiver
    OpenLink (who, layout, shares)    →
                                      ←      LinkAnswer (its layout, or why not)
    Offer                             →      ImportOffered to its engine, accepted whenever there are blocks
                                      ←      Accept (what is there already)
                                      ←      Grant (a receive is posted under `tag`), ahead where buffers are to spare
    Ready  (KV of so many messages)   →
                                      ←      Grant
    Data, payload under its `tag`     →
    Sent                              →
    Complete (first token)            →
                                      ←      Done (all ranks' shares are in this rank's blocks)

A receiver that can read the sender's pool itself (`reads` in LinkAnswer) takes KV from there, with no staging::

    Offer (the sender's tables)       →
                                      ←      Accept
    Readable                          →      read into its blocks
                                      ←      Ping, while it reads
    Kept  (for longer)                →
    Complete                          →
                                      ←      Done

Either side asks with Ping for what is due from the other. A Ping names the handoffs that its sender waits for: the
other answers Abort for one that it does not know, says Accept again if that may have been lost, and keeps what it has
told to be readable. So no end waits for what the other has never heard of, and a slow reader is not cut off.

Ready, Grant, Data and Sent repeat, as does Readable. The sender decides what goes into a message, and tells so in Data.
Abort ends a handoff from either side. **Every Grant is redeemed**: a sender that has nothing left to send for it sends
one byte under its tag and a Data of 0 bytes, so that the receiver's buffer comes back. A handoff is known by the number
that its sender gave it, unique on its connection: a frame that is late for one attempt can't be taken for another's.
How a message is packed is `kv_transfer.routes.Packing`'s.
"""

from __future__ import annotations

import zlib

import msgspec

from kv_transfer.layout import KvLayout, Tables
from kv_transfer.peer_memory import PoolName
from kv_transfer.pieces import Piece
from kv_transfer.routes import Shares
from pdserve import protocol
from pdserve.errors import TRANSFER_REASONS, ErrorInfo, MalformedMessage, TransferError
from pdserve.protocol import Key

WIRE_VERSION = 6
CHECKED = 0x80
CRC_BYTES = 4


class OpenLink(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """`instance` is the receiver's, as its address told it. `shares` are what this rank sends to that one, group by
    group. A message holds at most `max_message_bytes`. `pools` are where a receiver of the same host may read instead,
    one for each group that has layers here, or none."""

    worker_id: str
    instance: str
    layout: KvLayout
    shares: Shares
    max_message_bytes: int
    pools: tuple[PoolName | None, ...] = ()


class LinkAnswer(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """With `error`, the receiver wants nothing from this sender and closes the connection. Otherwise a message holds at
    most `max_message_bytes` of both sides, or if it `reads`, there are none."""

    worker_id: str
    layout: KvLayout | None = None
    max_message_bytes: int = 0
    error: ErrorInfo | None = None
    reads: bool = False


class Offer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """If the receiver reads, `tables` are the sender's blocks that hold the tokens, group by group. What is before a
    group's window may be -1."""

    handoff: int
    key: Key
    num_tokens: int
    tables: Tables = ()


class Accept(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """There are blocks. Tokens before `first_token` are in them already, and are not sent."""

    handoff: int
    first_token: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """By now the sender has KV for so many messages in all, and can use as many grants."""

    handoff: int
    num_messages: int


class Grant(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """A message may be sent under `tag`, which is never used again."""

    handoff: int
    tag: int


class Data(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """What comes under `tag`: `piece`, of `nbytes`; or nothing, for a grant that is given back. `crc32` is of the
    payload, `probe` of both its ends (`BlockCopier.probe`): the first handoff over a connection shows whether the
    network brings what it should."""

    handoff: int
    tag: int
    nbytes: int = 0
    piece: Piece | None = None
    crc32: int | None = None
    probe: int | None = None


class Sent(msgspec.Struct, frozen=True, array_like=True, tag=13):
    """The payload under `tag` has left the sender's buffer.

    A GPU receiver reads the buffer by itself: one that was frozen until the sender gave it up may have read what it
    holds by then. What is in its blocks counts only when this has come.
    """

    handoff: int
    tag: int


class Readable(msgspec.Struct, frozen=True, array_like=True, tag=14):
    """`piece` is computed, and stays as it is until `until_s` of the host's monotonic clock, or Done if that is sooner.
    What was read later counts for nothing. It is number `index` of its handoff, from 0. `crc32` is of the piece's
    blocks, one after the other."""

    handoff: int
    index: int
    piece: Piece
    until_s: float
    crc32: int | None = None


class Kept(msgspec.Struct, frozen=True, array_like=True, tag=15):
    """Every piece that was told to be readable stays as it is until `until_s`, as in Readable: the receiver asked."""

    handoff: int
    until_s: float


class Complete(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """All is computed, and can use `num_messages` grants in all; `first_token` was sampled from the last position.

    It follows Accept: until that came, the sender had all computed for `waited_s`.
    """

    handoff: int
    first_token: int
    num_messages: int
    waited_s: float = 0.0


class Done(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """All is in the receiver's blocks; it was reading for `read_s`, if it did."""

    handoff: int
    read_s: float = 0.0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """The handoff is over, from either side. `reason` is one of `pdserve.errors.TRANSFER_REASONS`."""

    handoff: int
    reason: str
    message: str

    def to_error(self) -> TransferError:
        """What the peer has said; a reason that we don't know is its mistake."""
        return TransferError(self.message, self.reason if self.reason in TRANSFER_REASONS else "protocol")


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """Sent while something is due from the peer, in these `handoffs` at least; one that answers nothing is frozen or
    gone."""

    handoffs: tuple[int, ...] = ()


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=12):
    pass


FromSender = OpenLink | Offer | Ready | Data | Sent | Readable | Kept | Complete
FromReceiver = LinkAnswer | Accept | Grant | Done
Message = FromSender | FromReceiver | Abort | Ping | Pong

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message, checked: bool = False) -> bytes:
    """`message` as a frame, which carries its checksum if `checked`."""
    body = _encoder.encode(message)
    if not checked:
        return bytes((WIRE_VERSION,)) + body
    return bytes((WIRE_VERSION | CHECKED,)) + zlib.crc32(body).to_bytes(CRC_BYTES, "big") + body


def decode(frame: bytes) -> Message:
    """The message in `frame`.

    Raises:
        TransferError: "protocol", for another wire version or something that is no message; "checksum".
    """
    if not frame or frame[0] & ~CHECKED != WIRE_VERSION:
        theirs = frame[0] if frame else None
        raise TransferError(f"the peer speaks wire version {theirs}, we speak {WIRE_VERSION}", "protocol", "version")
    body = memoryview(frame)[1:]
    if frame[0] & CHECKED:
        told, body = int.from_bytes(body[:CRC_BYTES], "big"), body[CRC_BYTES:]
        if zlib.crc32(body) != told:
            raise TransferError("the checksum of a control message does not match", "checksum")
    try:
        return protocol.decode(_decoder, body)
    except MalformedMessage as error:
        raise TransferError(f"the peer sent what is no message: {error}", "protocol") from None
